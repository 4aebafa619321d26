"""The way from a spectrogram to tokens: the definition, and the op's contract on any device."""

import pytest
import torch
import torch.nn.functional as F

from musiclm_kernels import embed_patches, reference
from musiclm_kernels.patch_dropout.reference import choose_patches

NAMES = (
    "patch_norm_weight", "patch_norm_bias", "weight", "bias", "norm_weight", "norm_bias",
)  # fmt: skip


def problem(P=4, D=12, B=3, W=5, H=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = ((P * P,), (P * P,), (D, P * P), (D,), (D,), (D,))
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    parameters = {n: x.to(dtype).requires_grad_() for n, x in zip(NAMES, drawn, strict=True)}
    spectrogram = torch.randn(B, W * P, H * P, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return spectrogram.to(wide).requires_grad_(), parameters


def token(spectrogram, parameters, P, b, column, row):
    """One token, written out."""
    patch = spectrogram[b, column * P : (column + 1) * P, row * P : (row + 1) * P]
    values = patch.T.flatten()  # bins before frames
    norm = (parameters["patch_norm_weight"], parameters["patch_norm_bias"])
    y = parameters["weight"] @ F.layer_norm(values, values.shape, *norm) + parameters["bias"]
    y = F.layer_norm(y, y.shape, parameters["norm_weight"], parameters["norm_bias"])
    quarter = len(y) // 4
    frequencies = torch.tensor(
        [10000 ** (-i / (quarter - 1)) for i in range(quarter)], dtype=torch.float64
    )
    x, y_place = column * frequencies, row * frequencies
    return y + torch.cat((x.sin(), x.cos(), y_place.sin(), y_place.cos()))


@pytest.mark.parametrize("function", [embed_patches, reference.embed_patches])
@pytest.mark.parametrize("num_valid", [None, torch.tensor([15, 6, 1])])
def test_each_token_is_its_patchs(function, num_valid):
    P, W, H, keep = 4, 5, 3, 9
    spectrogram, parameters = problem(P, W=W, H=H)
    tokens, indices, codes, mask = function(
        spectrogram, **parameters, patch_size=P, keep=keep, seed=3, num_valid=num_valid
    )
    wanted_counts = [9, 9, 9] if num_valid is None else [9, 4, 1]  # of 15: 0.6; 3.6; 0.6
    assert mask.sum(1).tolist() == wanted_counts
    for b in range(3):
        valid = W * H if num_valid is None else num_valid[b]
        kept = indices[b, : wanted_counts[b]]
        assert (kept.diff() > 0).all() and kept.max() < valid
        assert len(set(codes[b].tolist())) == len(set(indices[b].tolist())) == keep
        for slot in range(keep):
            column, row = divmod(int(indices[b, slot]), H)
            assert codes[b, slot] == column * (2 * H - 1) + row
            if mask[b, slot]:
                wanted = token(spectrogram, parameters, P, b, column, row)
                torch.testing.assert_close(tokens[b, slot], wanted)
            else:
                assert slot >= wanted_counts[b] and (tokens[b, slot] == 0).all()


def test_all_patches_stay_without_keep():
    spectrogram, parameters = problem()
    _, indices, _, mask = embed_patches(spectrogram, **parameters, patch_size=4)
    assert torch.equal(indices, torch.arange(15).expand(3, -1)) and mask.all()


def test_the_choice_of_a_row_follows_from_seed_row_and_patch():
    seed = torch.tensor(3)
    here = torch.device("cpu")
    short = choose_patches(seed, None, 2, 40, 20, here)[0]
    padded, _, counts = choose_patches(seed, torch.tensor([40, 40]), 2, 80, 40, here)
    assert counts.tolist() == [[20], [20]]
    assert torch.equal(padded[:, :20], short)


def test_rows_without_their_padding_embed_alike():
    spectrogram, parameters = problem()
    with torch.no_grad():
        options = {"patch_size": 4, "seed": 5}
        num_valid = torch.tensor([15, 9, 3])
        tokens, *_ = embed_patches(
            spectrogram, **parameters, keep=10, num_valid=num_valid, **options
        )
        spectrogram[1, 12:] = torch.nan
        spectrogram[2, 4:] = torch.nan
        again, *_ = embed_patches(
            spectrogram, **parameters, keep=10, num_valid=num_valid, **options
        )
    assert torch.equal(tokens, again)


@pytest.mark.parametrize("num_valid", [None, torch.tensor([8, 3])])
def test_gradients(num_valid):
    spectrogram, parameters = problem(2, 8, B=2, W=4, H=2)
    leaves = (spectrogram, *parameters.values())

    def tokens(spectrogram, *rest):
        named = dict(zip(NAMES, rest, strict=True))
        return embed_patches(
            spectrogram, **named, patch_size=2, keep=5, seed=1, num_valid=num_valid
        )[0]

    assert torch.autograd.gradcheck(tokens, leaves)
    out = tokens(*leaves)
    for ours, other in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(
            reference.embed_patches(
                spectrogram, **parameters, patch_size=2, keep=5, seed=1, num_valid=num_valid
            )[0].square().sum(), leaves,
        ),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, other)
    (grad,) = torch.autograd.grad(tokens(*leaves).square().sum(), spectrogram)
    touched = grad.unflatten(2, (2, 2)).unflatten(1, (4, 2)).abs().sum((2, 4)).flatten(1) > 0
    assert touched.sum(1).tolist() == ([5, 5] if num_valid is None else [5, 2])


def test_layout_and_dtypes():
    spectrogram, parameters = problem(dtype=torch.float32)
    options = {"patch_size": 4, "keep": 9, "seed": 1}
    tokens = embed_patches(spectrogram, **parameters, **options)[0]
    turned = spectrogram.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(embed_patches(turned, **parameters, **options)[0], tokens)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = {name: p.to(dtype) for name, p in parameters.items()}
        half = embed_patches(spectrogram, **narrow, **options)[0]
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), tokens, atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = embed_patches(spectrogram, **parameters, **options)[0]
    assert out.dtype == torch.bfloat16 and torch.equal(out, tokens.bfloat16())
    out.float().sum().backward()
    assert parameters["weight"].grad.dtype == torch.float32


def test_compiles_without_graph_break():
    spectrogram, parameters = problem(dtype=torch.float32)
    leaves = [spectrogram, *parameters.values()]

    def step(spectrogram, seed, num_valid):
        tokens, indices, codes, mask = embed_patches(
            spectrogram, **parameters, patch_size=4, keep=9, seed=seed, num_valid=num_valid
        )
        return tokens * mask[:, :, None], indices, codes

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (3, torch.tensor(3)):
        arguments = (spectrogram, seed, torch.tensor([15, 6, 2]))
        ours, wanted = compiled(*arguments), step(*arguments)
        assert all(map(torch.equal, ours, wanted))
        grads = [torch.autograd.grad(out[0].square().sum(), leaves) for out in (ours, wanted)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_contracts(dtype):
    spectrogram, parameters = problem(dtype=dtype)
    arguments = (
        spectrogram, torch.tensor([15, 6, 2]), torch.tensor(1), 9, 4, *parameters.values(), dtype,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.musiclm.embed_patches.default, arguments)
    tokens, indices, _, mask, slots = torch.ops.musiclm.embed_patches(*arguments)
    for wants_spectrogram in (False, True):
        rest = [p.detach() for p in parameters.values()]
        backward = (
            torch.ones_like(tokens), spectrogram.detach(), indices, mask, slots, 4, *rest,
            wants_spectrogram,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.musiclm.embed_patches_backward.default, backward)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spectrogram": torch.zeros(2, 8)}, "spectrogram has shape"),
        ({"spectrogram": torch.zeros(2, 8, 8, dtype=torch.int32)}, "spectrogram is torch.int32"),
        ({"spectrogram": torch.zeros(2, 8, 8).double()}, "weight is torch.float32"),
        ({"spectrogram": torch.zeros(2, 9, 8)}, "patch_size is 4, wanted a divisor"),
        ({"spectrogram": torch.zeros(2, 8, 6)}, "patch_size is 4, wanted a divisor"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"weight": torch.zeros(6, 16)}, "weight has 6 rows"),
        ({"weight": torch.zeros(4, 16)}, "weight has 4 rows"),
        ({"weight": torch.zeros(12, 15)}, "weight has shape"),
        ({"weight": torch.zeros(12, 16).double()}, "weight is torch.float64"),
        ({"bias": torch.zeros(11)}, "bias has shape"),
        ({"bias": torch.zeros(12).half()}, "bias is torch.float16"),
        ({"norm_weight": torch.zeros(12, device="meta")}, "norm_weight is on meta"),
        ({"patch_norm_bias": torch.zeros(12)}, "patch_norm_bias has shape"),
        ({"keep": 0}, "keep is 0"),
        ({"keep": 5}, "keep is 5, wanted 1 to 4"),
        ({"seed": None}, "seed is None"),
        ({"seed": torch.tensor([1])}, "seed has shape"),
        ({"num_valid": torch.tensor([1])}, "num_valid has shape"),
        ({"num_valid": torch.ones(2)}, "num_valid is torch.float32"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "spectrogram": torch.zeros(2, 8, 8),
        "patch_size": 4,
        "patch_norm_weight": torch.zeros(16),
        "patch_norm_bias": torch.zeros(16),
        "weight": torch.zeros(12, 16),
        "bias": torch.zeros(12),
        "norm_weight": torch.zeros(12),
        "norm_bias": torch.zeros(12),
        "keep": 3,
        "seed": 1,
    }
    with pytest.raises(ValueError, match=message):
        embed_patches(**arguments | change)
