"""The Triton kernels of patch dropout and of the audio tower's front end, in the interpreter."""

import pytest
import torch

from musiclm_kernels import drop_patches, embed_patches, reference
from musiclm_kernels.testing import through_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled there instead")
NAMES = (
    "patch_norm_weight", "patch_norm_bias", "weight", "bias", "norm_weight", "norm_bias",
)  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Everything a kernel allocates starts as NaN, or as an integer that no kernel writes."""
    pytest.importorskip("triton")
    empty = torch.empty

    def poison(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1)

    monkeypatch.setattr(torch, "empty", poison)


def problem(P, D, dtype, *, B=3, W=10, H=4, transposed=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0, around=0.0):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (around + scale * drawn).to(dtype).requires_grad_()

    shape = (B, H * P, W * P) if transposed else (B, W * P, H * P)
    spectrogram = torch.randn(shape, generator=generator).mul(2).add(-3)
    spectrogram = (spectrogram.transpose(1, 2) if transposed else spectrogram).requires_grad_()
    parameters = (
        draw(P * P, scale=0.1, around=1.0), draw(P * P, scale=0.1), draw(D, P * P, scale=1 / P),
        draw(D, scale=0.1), draw(D, scale=0.1, around=1.0), draw(D, scale=0.1),
    )  # fmt: skip
    return spectrogram, dict(zip(NAMES, parameters, strict=True))


def results(function, spectrogram, parameters, **options):
    tokens, *places = function(spectrogram, **parameters, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(tokens.shape, generator=generator, dtype=torch.float64).to(tokens.dtype)
    leaves = [spectrogram, *parameters.values()]
    return [tokens.detach(), *torch.autograd.grad(tokens, leaves, grad)], places


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


CASES = [
    (4, 24, {}),
    (4, 8, {"keep": 40}),
    (16, 200, {"num_valid": torch.tensor([3, 40, 1])}),
    (6, 136, {"num_valid": torch.tensor([14, 0, 99], dtype=torch.int32)}),
    (12, 64, {"transposed": True}),
    (8, 128, {"seed": torch.tensor(-(2**40))}),
    (3, 12, {}),
    (32, 40, {"B": 1, "W": 3, "H": 2, "keep": 4}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("P, D, options", CASES)
def test_kernels_give_the_definition(P, D, options, dtype):
    shape = {name: options[name] for name in ("B", "W", "H", "transposed") if name in options}
    spectrogram, parameters = problem(P, D, dtype, **shape)
    options = {"patch_size": P, "keep": 17, "seed": 9} | {
        name: value for name, value in options.items() if name not in shape
    }
    with through_kernels():
        ours, places = results(embed_patches, spectrogram, parameters, **options)
    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    wide = spectrogram.detach().double().requires_grad_()
    truth, wanted_places = results(reference.embed_patches, wide, exact, **options)
    for place, wanted in zip(places, wanted_places, strict=True):
        assert torch.equal(place, wanted) and place.dtype == wanted.dtype
    assert [x.dtype for x in ours] == [dtype, torch.float32, *[dtype] * 6]
    # Rounded factors, a rounded product and a rounded result: three roundings of 2^-p, and fp32's
    # sums. The gradients pass through another rounded product.
    budget = {torch.float16: 2 * 2**-11, torch.float32: 2**-20}[dtype]
    for one, right in zip(ours, truth, strict=True):
        assert relative_error(one, right) < budget


@pytest.mark.parametrize("D", [8, 768])
def test_positions_are_right_in_long_clips(D):
    """Tokens that are nothing but their position: a norm of weight zero."""
    spectrogram, parameters = problem(1, D, torch.float32, B=1, W=3000, H=1)
    parameters["norm_weight"] = torch.zeros(D)
    parameters["norm_bias"] = torch.zeros(D)
    with torch.no_grad(), through_kernels():
        options = {"patch_size": 1, "keep": 6, "seed": 0}
        tokens, indices, _, _ = embed_patches(spectrogram, **parameters, **options)
    frequencies = 10000 ** -torch.linspace(0, 1, D // 4, dtype=torch.float64)
    angle = indices[0, :, None] * frequencies
    zeros = torch.zeros_like(angle)
    wanted = torch.cat((angle.sin(), angle.cos(), zeros, zeros + 1), dim=1)
    # An angle of 3000 is a rounding of 2^-13 by itself, and its frequency is rounded before.
    assert (tokens[0] - wanted).abs().max() < 4 * 3000 * 2**-24


@pytest.mark.parametrize("B, N, keep", [(1, 1, 1), (3, 33, 32), (2, 600, 1), (2, 300, 225)])
def test_the_choice_is_the_definitions(B, N, keep):
    x = torch.randn(B, N, 3, requires_grad=True)
    wanted, indices = reference.drop_patches(x, keep, seed=2**40 + 3)
    grad = torch.randn(B, keep, 3)
    with through_kernels():
        kept, chosen = drop_patches(x, keep, seed=2**40 + 3)
        (ours,) = torch.autograd.grad(kept, x, grad)
    assert torch.equal(kept, wanted) and torch.equal(chosen, indices)
    assert torch.equal(ours, torch.autograd.grad(wanted, x, grad)[0])


def test_equal_words_keep_the_lower_patch(monkeypatch):
    choice = pytest.importorskip("musiclm_kernels.patch_dropout.choice")
    monkeypatch.setattr(
        choice.tl, "randint", lambda seed, offset: (offset * 0).to(choice.tl.uint32)
    )
    with through_kernels():
        _, indices = drop_patches(torch.zeros(2, 50, 1), 7, seed=0)
    assert indices.tolist() == [list(range(7))] * 2


def test_more_patches_than_a_program_ranks(monkeypatch):
    for module in ("kernel", "prepare"):
        monkeypatch.setattr(f"musiclm_kernels.patch_dropout.{module}.MAX_RANKED", 16)
    x = torch.randn(2, 40, 3)
    spectrogram, parameters = problem(4, 8, torch.float16)
    options = {"patch_size": 4, "keep": 9, "seed": 1, "num_valid": torch.tensor([40, 3, 9])}
    with through_kernels(), torch.no_grad():
        found = drop_patches(x, 13, seed=3)
        places = embed_patches(spectrogram, **parameters, **options)[1:]
    assert all(map(torch.equal, found, reference.drop_patches(x, 13, seed=3)))
    wanted = reference.embed_patches(spectrogram, **parameters, **options)[1:]
    assert all(map(torch.equal, places, wanted))


def test_several_programs_and_tiles_add_up(monkeypatch):
    backward = pytest.importorskip("musiclm_kernels.patch_dropout.backward")
    monkeypatch.setattr(backward, "MAX_PARTIALS", 3)
    monkeypatch.setattr(backward, "ROW_ELEMENTS", 64)
    monkeypatch.setattr(backward, "SUM_ROWS", 2)
    monkeypatch.setattr(backward, "UNFOLD_ROWS", 16)
    spectrogram, parameters = problem(4, 24, torch.float32)
    options = {"patch_size": 4, "keep": 17, "seed": 9}
    with through_kernels():
        ours, _ = results(embed_patches, spectrogram, parameters, **options)
        again, _ = results(embed_patches, spectrogram, parameters, **options)
    wide = spectrogram.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    truth, _ = results(reference.embed_patches, wide, exact, **options)
    for one, other, right in zip(ours, again, truth, strict=True):
        assert torch.equal(one, other) and relative_error(one, right) < 2**-20


def test_no_rows():
    spectrogram, parameters = problem(4, 8, torch.float16, B=0)
    options = {"patch_size": 4, "keep": 9, "seed": 1}
    with through_kernels():
        ours, _ = results(embed_patches, spectrogram, parameters, **options)
        assert drop_patches(torch.zeros(0, 9, 3), 5, seed=0)[0].shape == (0, 5, 3)
    assert ours[0].shape == (0, 9, 8) and all((g == 0).all() for g in ours[2:])


def test_the_interpreter_is_not_given_bfloat16():
    spectrogram, parameters = problem(4, 8, torch.bfloat16)
    with through_kernels(), pytest.raises(RuntimeError, match="bfloat16"):
        embed_patches(spectrogram, **parameters, patch_size=4)
