"""The Triton kernels of residual quantisation, in the interpreter, against the float64 definition."""

import pytest
import torch

from musiclm_kernels import implementations, reference, rvq_decode, rvq_encode
from musiclm_kernels.quantize import decode, encode
from musiclm_kernels.quantize.encode import Config, relative_error
from musiclm_kernels.testing import through_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled there instead")
MODES = ("exact", "fast")
# Both kernels, and both ways that the second multiplies: several tiles of codes each, and a rest.
TILES = {
    "in registers": Config(16, 16, 4, 1),
    "in memory": Config(16, 16, 4, 1, in_memory=True),
    "in memory, in parts": Config(16, 16, 4, 1, in_memory=True, part=16),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Everything a kernel allocates starts as NaN, or as an integer that no kernel writes."""
    empty = torch.empty

    def poison(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(123456789)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    monkeypatch.setattr(encode, "encode_config", lambda *_: TILES[request.param])
    monkeypatch.setattr(encode, "COLUMNS", 16)
    monkeypatch.setattr(encode, "PREPARED_ELEMENTS", 256)


def case(N=35, Q=3, K=37, D=20, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    codebooks = torch.randn(Q, K, D, generator=generator, dtype=torch.float64)
    codebooks /= torch.arange(1, Q + 1)[:, None, None]
    return (scale * x).to(dtype), (scale * codebooks).to(dtype)


def run(x, codebooks, mode):
    with through_kernels():
        return rvq_encode(x, codebooks, mode=mode)


def assert_as_promised(x, codebooks, codes, quantized, mode):
    """Every code's true distance is the smallest one's but for the bound that the docs derive, and
    `quantized` is the codes' sum. Returns the share of runners-up that the bound would refuse."""
    assert torch.equal(quantized, reference.rvq_decode(codes, codebooks))
    assert codes.dtype == torch.int64 and codes.shape == (len(x), len(codebooks))
    error = relative_error(mode, x.shape[1])
    residual = x.double()
    drift = torch.zeros(len(x), 1, dtype=torch.float64)
    refused = []
    for level, book in enumerate(codebooks.double()):
        r, c = residual.norm(dim=1)[:, None], book.norm(dim=1)[None, :]
        if level:
            drift += 2.0**-24 * r
        bound = error * c * (c + 2 * r) + 2 * c * drift + 2.0**-33 * r * c.amax()
        distance = book.square().sum(1) - 2 * residual @ book.T  # less |r|^2, and its rounding
        smallest, best = distance.min(1, keepdim=True)
        room = smallest + bound.gather(1, best) + bound
        chosen = codes[:, level : level + 1]
        assert (distance.gather(1, chosen) <= room.gather(1, chosen)).all(), f"level {level}"
        if len(book) > 1:
            second = distance.topk(2, dim=1, largest=False).indices[:, 1:]
            refused.append((distance.gather(1, second) > room.gather(1, second)).double().mean())
        residual = residual - book[chosen[:, 0]]
    return min(refused, default=torch.ones(()))


def test_there_are_kernels():
    for name in ("rvq_encode", "rvq_decode"):
        assert implementations()[name]["cuda"] == "triton"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"N": 1},
        {"K": 2, "D": 8},
        {"K": 1, "D": 1, "Q": 1},
        {"Q": 32, "K": 5, "D": 9, "N": 17},
        {"K": 64, "D": 32},
        {"N": 64, "D": 70, "Q": 2},
        {"dtype": torch.float16},
    ],
)
def test_codes_are_the_nearest_within_the_bound(tiles, mode, shape):
    x, codebooks = case(**shape)
    results = run(x, codebooks, mode)
    # A wrong code would not pass: of a hundred runners-up, a few are this near.
    assert assert_as_promised(x, codebooks, *results, mode) > (0.9 if mode == "exact" else 0.8)
    truth, _ = reference.rvq_encode(x, codebooks)
    assert (results[0] == truth).double().mean() > (0.999 if mode == "exact" else 0.9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [16, 100, 130, 300])  # registers, and memory from 129 on
def test_shipped_tiles(mode, D):
    x, codebooks = case(N=70, Q=2, K=70, D=D)
    codes, quantized = run(x, codebooks, mode)
    assert_as_promised(x, codebooks, codes, quantized, mode)
    truth, _ = reference.rvq_encode(x, codebooks)
    assert (codes == truth).double().mean() > 0.97


def test_the_exact_mode_sees_what_the_fast_one_cannot(tiles):
    """One of two codes is nearer, by what fp16 factors lose and the bound of "exact" does not cover:
    any of the three products left out would show."""
    generator = torch.Generator().manual_seed(5)
    codebooks = torch.randn(1, 2, 20, generator=generator)
    apart = codebooks[0, 1] - codebooks[0, 0]
    around = 0.5 * torch.randn(200, 20, generator=generator)
    around -= torch.outer(around @ apart, apart) / apart.square().sum()
    nearer = torch.arange(200) % 2
    x = codebooks[0].mean(0) + torch.outer(4e-5 * (nearer - 0.5), apart) + around
    codes, quantized = run(x, codebooks, "exact")
    assert torch.equal(codes[:, 0], nearer)
    assert assert_as_promised(x, codebooks, codes, quantized, "exact") == 1
    assert not torch.equal(run(x, codebooks, "fast")[0], codes)


@pytest.mark.parametrize("mode", MODES)
def test_equal_codes_take_the_lowest_index(tiles, mode):
    x, codebooks = case(K=13)
    tripled = torch.cat([codebooks.flip(1), codebooks, codebooks.flip(1)], 1)
    codes, _ = run(x, tripled, mode)
    assert codes.max() < 13
    assert torch.equal(codes, run(x, codebooks.flip(1).contiguous(), mode)[0])
    zeros, _ = run(x, torch.zeros(2, 40, 20), mode)
    assert zeros.eq(0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e30])
def test_any_scale(tiles, mode, scale):
    x, codebooks = case(scale=scale)
    codes, _ = run(x, codebooks, mode)
    truth, _ = reference.rvq_encode(x, codebooks)
    assert (codes == truth).double().mean() > (0.999 if mode == "exact" else 0.9)


def test_levels_and_vectors_of_different_scales(tiles):
    x, codebooks = case(N=40, Q=4)
    x *= (10.0 ** torch.linspace(-12, 12, 40))[:, None]
    codebooks *= (10.0 ** torch.tensor([4.0, -1.0, -5.0, -20.0]))[:, None, None]
    codes, quantized = run(x, codebooks, "exact")
    assert_as_promised(x, codebooks, codes, quantized, "exact")


def test_x_with_strides_and_narrow_codebooks(tiles):
    x, codebooks = case()
    wide = torch.stack([x, x], 1)
    wanted = run(x, codebooks, "exact")
    for view in (wide[:, 1], x.t().contiguous().t()):
        assert view.stride() != x.stride()
        for one, other in zip(run(view, codebooks, "exact"), wanted, strict=True):
            assert torch.equal(one, other)
    narrow = codebooks.half()
    assert_as_promised(x, narrow, *run(x, narrow, "exact"), "exact")
    strided = codebooks.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(x, strided, "exact")[0], wanted[0])


def test_rows_that_are_not_numbers_disturb_no_other(tiles):
    x, codebooks = case()
    wanted, _ = run(x, codebooks, "exact")
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[3, 5] = value
        codes, quantized = run(spoilt, codebooks, "exact")
        assert codes[3].ge(0).all() and codes[3].lt(37).all()
        codes[3] = wanted[3]
        assert torch.equal(codes, wanted) and quantized.isfinite().all()


def test_nothing_to_encode_or_decode():
    x, codebooks = case(N=0)
    codes, quantized = run(x, codebooks, "exact")
    assert codes.shape == (0, 3) and quantized.shape == (0, 20)
    with through_kernels():
        assert rvq_decode(codes, codebooks).shape == (0, 20)
        assert rvq_decode(torch.zeros(2, 0, dtype=torch.int64), codebooks).eq(0).all()


def test_a_width_that_no_kernel_takes():
    with pytest.raises(ValueError, match="x has width 513, wanted 1 to 512 on CUDA"):
        run(torch.zeros(2, 513), torch.zeros(1, 3, 513), "exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [1, 20, 64])
@pytest.mark.parametrize("levels", [1, 3])
def test_decode(monkeypatch, dtype, D, levels):
    monkeypatch.setattr(decode, "TILE_ELEMENTS", 128)
    monkeypatch.setattr(decode, "MAX_COLUMNS", 16)
    generator = torch.Generator().manual_seed(1)
    codebooks = torch.randn(3, 7, D, generator=generator).to(dtype)
    codes = torch.randint(-1, 7, (19, levels), generator=generator)
    wanted = reference.rvq_decode(codes, codebooks)
    for given in (codes, codes.int(), codes.t().contiguous().t()):
        with through_kernels():
            out = rvq_decode(given, codebooks)
        assert out.dtype == wanted.dtype and torch.equal(out, wanted)


def test_decode_adds_nothing_for_a_code_out_of_range():
    codebooks = torch.ones(2, 3, 4)
    codes = torch.tensor([[0, 3], [2**40, 2], [-7, -1]])
    with through_kernels():
        assert torch.equal(rvq_decode(codes, codebooks)[:, 0], torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("mode", MODES)
def test_op_contracts(tiles, mode):
    x, codebooks = case(N=5)
    codes, _ = rvq_encode(x, codebooks)
    with through_kernels():
        torch.library.opcheck(torch.ops.musiclm.rvq_encode.default, (x, codebooks, mode))
        torch.library.opcheck(torch.ops.musiclm.rvq_decode.default, (codes, codebooks))


def test_compiled_is_eager(tiles):
    def both(x, codebooks):
        codes, quantized = rvq_encode(x, codebooks, mode="fast")
        return codes, quantized + rvq_decode(codes, codebooks)

    x, codebooks = case(N=9)
    with through_kernels():
        eager = both(x, codebooks)
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x, codebooks)
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)
