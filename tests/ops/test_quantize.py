import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_kernels import reference, rvq_decode, rvq_encode
from musiclm_kernels.quantize import certified
from musiclm_kernels.quantize import reference as quantize_reference


def case(N=33, Q=3, K=17, D=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    codebooks = torch.randn(Q, K, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), (codebooks / torch.arange(1, Q + 1)[:, None, None]).to(dtype)


def nearest_by_loops(x, codebooks):
    """Codes by the definition: the true distance to every code, one vector at a time."""
    codes = torch.empty(len(x), len(codebooks), dtype=torch.int64)
    for n, residual in enumerate(x.double()):
        for level, book in enumerate(codebooks.double()):
            distances = (residual - book).square().sum(1).tolist()
            codes[n, level] = distances.index(min(distances))
            residual = residual - book[codes[n, level]]
    return codes


@pytest.mark.parametrize("function", [rvq_encode, reference.rvq_encode])
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("shape", [{}, {"N": 1, "Q": 1, "K": 1, "D": 1}, {"N": 2500, "Q": 2}])
def test_codes_are_the_nearest(function, mode, shape):
    x, codebooks = case(**shape)
    codes, quantized = function(x, codebooks, mode=mode)
    assert torch.equal(codes, nearest_by_loops(x, codebooks))
    assert quantized.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_codes_of_narrower_inputs(dtype):
    x, codebooks = case(N=300, K=64, dtype=dtype)
    codes, quantized = rvq_encode(x, codebooks)
    assert torch.equal(codes, nearest_by_loops(x, codebooks))
    assert quantized.dtype == torch.float32
    fast, _ = rvq_encode(x, codebooks, mode="fast")
    assert (fast == codes).float().mean() > 0.99


def test_exact_sees_what_fp32_cannot():
    base = torch.full((1, 1), 4096.0)
    codebooks = torch.tensor([[[4096.0 + 2**-8], [4096.0 - 2**-9]]])  # |c|^2 is 1.7e7 in fp32
    assert rvq_encode(base, codebooks)[0].item() == 1


@pytest.mark.parametrize("K, D", [(16, 64), (3, 100), (5, 3)])  # small: products then differ
def test_ties_take_the_lowest_index(K, D):
    x, codebooks = case(N=200, K=K, D=D)
    tripled = torch.cat([codebooks, codebooks.flip(1), codebooks], 1)
    codes, _ = rvq_encode(x, tripled)
    assert torch.equal(codes, nearest_by_loops(x, tripled))
    zeros, _ = rvq_encode(x.float(), torch.zeros(2, 9, D))
    assert zeros.eq(0).all()


def same_as_the_definition(x, codebooks, mode="exact"):
    """Whether the CPU body gives the definition's bits, with the body's chunks of 64 vectors."""
    with mock.patch.object(certified, "CHUNK_DISTANCES", 64 * codebooks.shape[1]):
        ours = rvq_encode(x, codebooks, mode=mode)
    return all(map(torch.equal, ours, reference.rvq_encode(x, codebooks, mode=mode)))


@pytest.fixture
def settled(monkeypatch):
    """The vectors that the CPU body searches again in float64, a number for each time it does."""
    counts = []
    nearest = quantize_reference.nearest

    def count(residual, book):
        counts.append(len(residual))
        return nearest(residual, book)

    monkeypatch.setattr(quantize_reference, "nearest", count)
    return counts


@pytest.mark.parametrize("K", [1, 2, 31, 32, 33, 200])
@pytest.mark.parametrize("D", [1, 20, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_finds_the_codes_of_float64(settled, K, D, dtype):
    x, codebooks = case(N=150, K=K, D=D, dtype=dtype)
    wanted = reference.rvq_encode(x, codebooks)
    settled.clear()
    assert all(map(torch.equal, rvq_encode(x, codebooks), wanted))
    if D > 1 and dtype == torch.float32:
        assert sum(settled) < 0.02 * x.shape[0] * 3  # and hardly ever asks for it


@pytest.mark.parametrize("relative", [0.0, 1e-9, 1e-7, 3e-7, 1e-6, 1e-5])
def test_codes_that_are_nearly_as_near(settled, relative):
    """Every code has neighbours that only float64 tells apart from it."""
    x, codebooks = case(N=200, K=24, D=40, dtype=torch.float32)
    generator = torch.Generator().manual_seed(9)
    noise = [torch.randn(codebooks.shape, generator=generator) for _ in range(3)]
    crowded = torch.cat([codebooks * (1 + relative * n) for n in noise], 1)
    crowded = crowded[:, torch.randperm(72, generator=generator)]
    assert same_as_the_definition(x, crowded)
    assert sum(settled) >= 200  # at least the first level's


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_nothing_to_encode(mode):
    x, codebooks = case(dtype=torch.float32)
    codes, quantized = rvq_encode(x[:0], codebooks, mode=mode)
    assert codes.shape == (0, 3) and quantized.shape == (0, 5)


def test_vectors_halfway_between_codes(settled):
    _, codebooks = case(K=40, D=16, dtype=torch.float32)
    first, second = torch.combinations(torch.arange(40)).T
    x = (codebooks[0, first] + codebooks[0, second]) / 2
    assert same_as_the_definition(x, codebooks)
    assert same_as_the_definition(x + 1e-7 * torch.randn(x.shape), codebooks)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-22, 1e-20, 1e-12, 1e12, 1e18, 1e19, 1e30])
@pytest.mark.parametrize("of_x", [1.0, 1e-8, 1e8])
def test_exact_at_any_scale(scale, of_x):
    x, codebooks = case(N=100, K=50, D=16, dtype=torch.float32)
    assert same_as_the_definition(of_x * scale * x, scale * codebooks)


def test_a_residual_that_fp32_has_rounded():
    """Small vectors that a level takes into numbers near one, and the next back."""
    generator = torch.Generator().manual_seed(2)
    codebooks = torch.ones(3, 64, 4)
    codebooks[1] = -1
    codebooks[2] = 1e-4 * torch.randn(64, 4, generator=generator)
    x = 1e-4 * torch.randn(2000, 4, generator=generator)
    assert same_as_the_definition(x, codebooks)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rows_that_are_not_numbers_disturb_no_other(value, mode):
    x, codebooks = case(N=100, K=50, dtype=torch.float32)
    wanted, _ = rvq_encode(x, codebooks, mode=mode)
    x[7, 2] = value
    codes, _ = rvq_encode(x, codebooks, mode=mode)
    assert codes[7].ge(0).all() and codes[7].lt(50).all()
    if mode == "exact":
        assert torch.equal(codes, reference.rvq_encode(x, codebooks)[0])
    codes[7] = wanted[7]
    assert torch.equal(codes, wanted)
    codebooks[1, 3, 0] = value
    assert rvq_encode(x, codebooks, mode=mode)[0].lt(50).all()


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_no_tensor_of_all_distances(mode):
    N, K = 4096, 1024
    x, codebooks = case(N=N, Q=2, K=K, D=8, dtype=torch.float32)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    with Largest() as largest:
        certified.rvq_encode(x, codebooks, mode)
        certified.rvq_encode(torch.zeros_like(x), torch.zeros_like(codebooks), mode)  # all ties
    at_most = max(certified.CHUNK_DISTANCES, quantize_reference.CHUNK_ROWS * K)
    assert certified.CHUNK_DISTANCES <= largest.numel <= at_most < N * K


def test_quantized_is_the_decoded_codes():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x, codebooks = case(dtype=dtype)
        for mode in ("exact", "fast"):
            codes, quantized = rvq_encode(x, codebooks, mode=mode)
            assert torch.equal(rvq_decode(codes, codebooks), quantized)


def test_every_level_brings_it_closer():
    x, codebooks = case(N=200, Q=6, K=64)
    codebooks[:, 0] = 0  # no level can then do harm
    codes, _ = rvq_encode(x, codebooks)
    errors = [(x - rvq_decode(codes[:, :q], codebooks)).square().sum(1) for q in range(7)]
    assert all((errors[q + 1] <= errors[q] + 1e-12).all() for q in range(6))


@pytest.mark.parametrize("function", [rvq_decode, reference.rvq_decode])
def test_decode_sums_and_skips_missing_codes(function):
    _, codebooks = case()
    codes = torch.tensor([[0, 3, 16], [5, -1, -1], [-1, 2, 2], [-1, -1, -1]])
    wanted = torch.stack(
        [
            codebooks[0, 0] + codebooks[1, 3] + codebooks[2, 16],
            codebooks[0, 5],
            codebooks[1, 2] + codebooks[2, 2],
            torch.zeros(5),
        ]
    )
    torch.testing.assert_close(function(codes, codebooks), wanted)
    torch.testing.assert_close(function(codes.int()[:, :1], codebooks)[1], codebooks[0, 5])
    assert function(codes[:0], codebooks).shape == (0, 5)


def test_results_carry_no_gradient():
    x, codebooks = (y.requires_grad_() for y in case())
    codes, quantized = rvq_encode(x, codebooks)
    assert not quantized.requires_grad and not rvq_decode(codes, codebooks).requires_grad


def test_op_contracts():
    x, codebooks = case(dtype=torch.float32)
    ops = torch.ops.musiclm
    torch.library.opcheck(ops.rvq_encode.default, (x, codebooks, "exact"))
    torch.library.opcheck(ops.rvq_encode.default, (x.bfloat16(), codebooks, "fast"))
    codes, _ = rvq_encode(x, codebooks)
    torch.library.opcheck(ops.rvq_decode.default, (codes, codebooks))


def test_compiles_without_graph_break():
    def step(x, codebooks):
        codes, quantized = rvq_encode(x, codebooks)
        return quantized + rvq_decode(codes, codebooks)

    x, codebooks = case(dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x, codebooks), step(x, codebooks))


X, BOOKS = torch.zeros(4, 5), torch.zeros(3, 7, 5)
CODES = torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rvq_encode(X[0], BOOKS), "x has shape"),
        (lambda: rvq_encode(X.long(), BOOKS), "x is torch.int64"),
        (lambda: rvq_encode(X, BOOKS[0]), "codebooks has shape"),
        (lambda: rvq_encode(X, BOOKS[..., :4]), "codebooks has shape"),
        (lambda: rvq_encode(X, BOOKS[:, :0]), "codebooks has shape"),
        (lambda: rvq_encode(X, BOOKS, mode="slow"), "mode is 'slow'"),
        (lambda: rvq_decode(CODES[0], BOOKS), "codes has shape"),
        (lambda: rvq_decode(CODES, BOOKS[:2]), "codes has 3 levels, wanted at most 2"),
        (lambda: rvq_decode(CODES.float(), BOOKS), "codes is torch.float32"),
        (lambda: rvq_decode(CODES + 7, BOOKS), "codes span 7 to 7, wanted -1 to 6"),
        (lambda: rvq_decode(CODES - 2, BOOKS), "codes span -2 to -2"),
        (lambda: rvq_decode(CODES, BOOKS.long()), "codebooks is torch.int64"),
    ],
)
def test_refusals(call, name):
    with pytest.raises(ValueError, match=name):
        call()
