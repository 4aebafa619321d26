"""The Triton kernels of biased attention, in the interpreter, against the float64 definition."""

import pytest
import torch
import torch.nn.functional as F

from musiclm_kernels import biased_attention, reference
from musiclm_kernels.attention import backward, forward, launch, table_gradient
from musiclm_kernels.attention.launch import Config
from musiclm_kernels.testing import through_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled there instead")
BIG = 2**30


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Everything a kernel allocates starts as NaN, or as an integer that no kernel writes."""
    empty = torch.empty

    def poison(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(123456789)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles each way from a few tokens: full ones, masked ones and a rest."""
    monkeypatch.setattr(forward, "forward_config", lambda *_: Config(16, 16, 4, 1))
    monkeypatch.setattr(backward, "keys_config", lambda _: Config(16, 32, 4, 1))
    monkeypatch.setattr(backward, "queries_config", lambda _: Config(32, 16, 4, 1))


def line(N, M, B=None):
    codes = torch.arange(max(N, M), dtype=torch.int32)[None]
    return codes[:, -N:], codes[:, :M], 2 * max(N, M) - 1, max(N, M) - 1


def grid(columns, rows, kept=None, B=2):
    """Codes of a patch grid; `kept` of them in each batch row, as patch dropout leaves them."""
    step = 2 * rows - 1
    codes = (torch.arange(columns)[:, None] * step + torch.arange(rows)).flatten().int()[None]
    if kept is not None:
        generator = torch.Generator().manual_seed(3)
        order = [torch.randperm(columns * rows, generator=generator) for _ in range(B)]
        codes = torch.stack([codes[0, places[:kept].sort().values] for places in order])
    return codes, codes, step * (2 * columns - 1), (columns - 1) * step + rows - 1


def anything(N, M, B=2):
    """Codes with repetitions, negative ones and ones far outside the table."""
    generator = torch.Generator().manual_seed(4)
    q_codes = torch.randint(-5, 50, (B, N), generator=generator, dtype=torch.int32)
    k_codes = torch.randint(-5, 50, (1, M), generator=generator, dtype=torch.int32)
    q_codes[0, 0], k_codes[0, 1], k_codes[0, 4] = BIG, -BIG, BIG
    return q_codes, k_codes, 37, 11


def problem(N, M, D=16, B=2, H=2, Hkv=2, bias=None, masked=False, normalised=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [draw(B, H, N, D), draw(B, Hkv, M, D), draw(B, Hkv, M, D)]
    options = {}
    if normalised:
        tensors[:2] = (F.normalize(x, dim=-1) for x in tensors[:2])
        options["scale"] = 8.0
    if bias is not None:
        options["q_codes"], options["k_codes"], T, options["offset"] = bias
        tensors.append(draw(H, T))
    if masked:
        options["key_mask"] = torch.rand(B, M, generator=generator) > 0.4
        options["key_mask"][0] = False
    return tensors, options, draw(B, H, N, D)


def run(function, tensors, options, weight, dtype):
    """The output, then the gradient of each tensor."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype if n < 3 else wide).requires_grad_() for n, x in enumerate(tensors)]
    table = leaves[3] if len(leaves) > 3 else None
    out = function(*leaves[:3], table=table, **options)
    return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


def check(tensors, options, weight, dtype=torch.float32, **of_kernel):
    """A kernel may err twice as much as the definition errs in the same precision."""
    tensors = [x.to(dtype).double() for x in tensors]
    exact = run(
        reference.biased_attention, tensors, options, weight.to(dtype).double(), torch.float64
    )
    plain = run(biased_attention, tensors, options, weight, dtype)
    with through_kernels():
        ours = run(biased_attention, tensors, options | of_kernel, weight, dtype)
    largest = torch.stack([x.abs().max() for x in exact])
    for n, (one, other, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        # An entry of the table's gradient is a sum of many that may cancel.
        scale = largest.max() if n == 4 else largest[n].clamp_min(1e-3)
        budget = 2 * (other.double() - wanted).abs().max() + 8 * torch.finfo(dtype).eps * scale
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.double() - wanted).abs().max() <= budget  # NaN fails, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "bias", [None, line(40, 40), anything(40, 40)], ids=["none", "line", "any"]
)
def test_kernels_are_the_definition(small_tiles, dtype, causal, bias):
    check(*with_options(problem(40, 40, bias=bias), causal=causal), dtype)


def with_options(of_problem, **options):
    tensors, given, weight = of_problem
    return tensors, given | options, weight


@pytest.mark.parametrize("N, M", [(1, 1), (1, 33), (33, 1), (20, 37), (37, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(small_tiles, N, M, causal):
    check(*with_options(problem(N, M, B=1, H=1, Hkv=1, bias=line(N, M)), causal=causal))


@pytest.mark.parametrize("Hkv", [1, 2])
def test_shared_key_heads(small_tiles, Hkv):
    check(*problem(20, 33, H=4, Hkv=Hkv, B=1, bias=line(20, 33)))


@pytest.mark.parametrize("causal", [False, True])
def test_key_mask_and_rows_that_see_nothing(small_tiles, causal):
    tensors, options, weight = problem(37, 37, bias=line(37, 37), masked=True)
    check(tensors, options | {"causal": causal}, weight)
    with through_kernels():
        out, *grads = run(biased_attention, tensors, options, weight, torch.float32)
    assert out[0].eq(0).all() and all(grad[0].eq(0).all() for grad in grads[:3])


@pytest.mark.parametrize("D", [48, 64, 80, 128])
def test_widths(small_tiles, D):
    check(*problem(20, 20, D=D, B=1, H=1, Hkv=1, bias=line(20, 20)))


@pytest.mark.parametrize("causal", [False, True])
def test_dropout(small_tiles, causal):
    options = {"dropout": 0.3, "dropout_seed": 2**40 + 17, "causal": causal}
    check(*with_options(problem(33, 33, bias=anything(33, 33)), **options))


@pytest.mark.parametrize("bias", [None, line(40, 40)], ids=["none", "line"])
@pytest.mark.parametrize("bound", [8.1, 1e30], ids=["used", "too wide"])
def test_a_bound_on_scores(small_tiles, bias, bound):
    case = problem(40, 40, B=1, bias=bias, normalised=True)
    check(*case, score_bound=torch.full((2,), bound))


@pytest.mark.parametrize("masked", [False, True])
def test_a_bound_beside_masks(small_tiles, masked):
    case = problem(40, 40, bias=line(40, 40), normalised=True, masked=masked)
    check(*with_options(case, causal=True), score_bound=torch.full((2,), 8.1))


@pytest.mark.parametrize("grid_rows", [1, 3, 4, 100])
@pytest.mark.parametrize("kept", [None, 30], ids=["dense", "patch dropout"])
def test_table_gradient_of_a_grid(small_tiles, grid_rows, kept):
    bias = grid(13, 4, kept)
    N = bias[0].shape[1]
    check(*with_options(problem(N, N, H=1, Hkv=1, bias=bias), grid_rows=grid_rows))


@pytest.mark.parametrize(
    "T, offset", [(9, 4), (1, 0), (2, 0), (300, 150), (79, 1000), (9, 3 - 2**31), (9, 2**40)]
)
def test_tables_that_do_not_fit_their_codes(small_tiles, T, offset):
    q_codes, k_codes, _, _ = line(40, 40)
    check(*problem(40, 40, B=1, H=1, Hkv=1, bias=(q_codes, k_codes, T, offset)))


def test_walks_that_share_a_diagonal(small_tiles, monkeypatch):
    monkeypatch.setattr(table_gradient, "PROGRAMS", 1)
    check(*problem(70, 70, B=1, H=1, Hkv=1, bias=line(70, 70)))
    monkeypatch.setattr(table_gradient, "PROGRAMS", 10**6)
    check(*problem(70, 70, B=1, H=1, Hkv=1, bias=line(70, 70)))


def test_a_table_too_large_to_hold(small_tiles, monkeypatch):
    monkeypatch.setattr(launch, "MAX_GATHERED", 8)
    check(*problem(20, 20, B=1, bias=line(20, 20)))


@pytest.mark.parametrize("Hkv", [1, 3])
def test_strided_inputs_and_results(small_tiles, Hkv):
    tensors, options, weight = problem(20, 20, bias=line(20, 20), B=2, H=3, Hkv=Hkv)

    def strided(x):
        """[B, H, N, D] in the memory of [B, N, 2, H, D], of which it is a part."""
        return torch.stack((x, x)).permute(1, 3, 0, 2, 4).contiguous()[:, :, 1].transpose(1, 2)

    table = tensors[3].float()
    results = []
    for layout in (lambda x: x, strided):
        leaves = [layout(x.float()).requires_grad_() for x in tensors[:3]] + [table.clone()]
        leaves[3].requires_grad_()
        with through_kernels():
            out = biased_attention(*leaves[:3], table=leaves[3], **options)
            grads = torch.autograd.grad(out, leaves, layout(weight.float()))
        results.append([out, *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    for x in results[1][:4]:
        assert x.transpose(1, 2).is_contiguous()


def test_rows_that_are_not_packed(small_tiles):
    tensors, options, weight = problem(20, 20, B=1, bias=line(20, 20))
    across = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors[:3]]
    weight = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    check([*across, tensors[3]], options, weight)


def test_entries_of_minus_infinity_hide_their_pairs(small_tiles):
    tensors, options, weight = problem(40, 40, bias=line(40, 40))
    tensors[3][:, :41] = -torch.inf  # keys at and after the query
    tensors[3][1, 45:] = -torch.inf
    check(tensors, options, weight)


def test_shipped_tiles():
    check(*problem(150, 140, B=1, H=1, Hkv=1, D=64, bias=line(150, 140)), torch.float16)


def test_no_keys_and_no_rows():
    with through_kernels():
        for B, N, M in ((2, 3, 0), (0, 3, 4), (2, 0, 4)):
            q, k = torch.randn(B, 2, N, 16, requires_grad=True), torch.randn(B, 2, M, 16)
            out = biased_attention(q, k, k)
            out.sum().backward()
            assert out.shape == q.shape and out.eq(0).all() and q.grad.eq(0).all()


def test_refusals():
    q = torch.randn(1, 1, 2, 160)
    with through_kernels():
        with pytest.raises(ValueError, match="q has width 160, wanted at most 128"):
            biased_attention(q, q, q)
        for dtype in (torch.float64, torch.bfloat16):
            with pytest.raises(RuntimeError, match="no Triton kernel of musiclm::biased_attention"):
                biased_attention(*(q.to(dtype),) * 3)
