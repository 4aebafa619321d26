"""The Triton kernels of the contrastive losses, in the interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F

from musiclm_kernels import contrastive_gradient, contrastive_statistics, reference
from musiclm_kernels.testing import through_kernels

kernel = pytest.importorskip("musiclm_kernels.contrastive.kernel")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled there instead")
KINDS = ["softmax", "decoupled", "sigmoid"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Everything a kernel allocates starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles each way from a few pairs."""
    config = kernel.Config(32, 16, 32, 32, 4, 1)
    monkeypatch.setattr(kernel, "statistics_config", lambda *_: config)
    monkeypatch.setattr(kernel, "gradient_config", lambda *_: config)


def problem(kind, L, B, D, dtype, scale=10.0):
    generator = torch.Generator().manual_seed(B + L)
    rows = torch.randn(2, L, B, D, generator=generator, dtype=torch.float64)
    audio, text = F.normalize(rows, dim=-1).to(dtype)
    temperature = scale * (1 + torch.rand(L, generator=generator))
    bias = -5 * torch.rand(L, generator=generator) if kind == "sigmoid" else None
    return audio, text, temperature, bias, 0.5 + torch.rand(L, generator=generator)


def run(functions, audio, text, temperature, bias, grad, kind, first, count):
    statistics, gradient = functions
    options = {"kind": kind, "bias": bias}
    results = statistics(audio, text, temperature, **options, first=first, count=count)
    wide = [None if x is None else x.double() for x in (audio, text, temperature, bias)]
    log_sums = reference.contrastive_statistics(
        *wide[:3], kind=kind, bias=wide[3], first=0, count=audio.shape[1]
    )[1].to(results[1].dtype)
    grads = gradient(grad, audio, text, log_sums, temperature, **options, first=first, count=count)
    return (*results, *grads)


OURS = (contrastive_statistics, contrastive_gradient)
PLAIN = (reference.contrastive_statistics, reference.contrastive_gradient)


def check(inputs, kind, first, count, slack=8.0):
    """A kernel may err twice as much as the definition errs in the same precision, and some
    roundings of the largest value."""
    exact = run(PLAIN, *(None if x is None else x.double() for x in inputs), kind, first, count)
    plain = run(PLAIN, *inputs, kind, first, count)
    with through_kernels():
        ours = run(OURS, *inputs, kind, first, count)
    for one, other, wanted in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == wanted.shape
        if wanted.numel() == 0:
            continue
        error = (one.double() - wanted).abs().max()
        own = (other.double() - wanted).abs().max()
        rounding = slack * torch.finfo(one.dtype).eps * wanted.abs().max().clamp_min(1e-3)
        assert error <= 2 * own + rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("L, B, first, count", [(1, 5, 0, 5), (1, 33, 0, 33), (3, 64, 10, 39)])
def test_kernels_are_the_definition(small_tiles, kind, dtype, L, B, first, count):
    check(problem(kind, L, B, 20, dtype), kind, first, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [32, 70])  # one whole chunk; three, the last not whole
def test_widths(small_tiles, kind, D):
    check(problem(kind, 1, 37, D, torch.float32), kind, 3, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_tiles(kind):
    check(problem(kind, 1, 70, 20, torch.float16), kind, 0, 70)


def test_one_pair_sigmoid(small_tiles):
    check(problem("sigmoid", 2, 1, 20, torch.float32), "sigmoid", 0, 1)


def test_one_pair_softmax_has_no_loss(small_tiles):
    inputs = problem("softmax", 2, 1, 20, torch.float32)
    with through_kernels():
        losses, _, slopes, *grads = run(OURS, *inputs, "softmax", 0, 1)
    assert losses.eq(0).all() and slopes.eq(0).all()
    # Two weights of one, of which two are taken: their roundings times the temperature are left.
    assert all(0 <= grad.abs().max() < 1e-4 for grad in grads)


def test_two_pairs_decoupled(small_tiles):
    check(problem("decoupled", 1, 2, 20, torch.float32), "decoupled", 0, 2, slack=32.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_huge_temperatures_and_equal_rows(small_tiles, kind, dtype):
    audio, text, temperature, bias, grad = problem(kind, 1, 37, 20, dtype, scale=5e4)
    audio[:, 5], text[:, 5] = audio[:, 4], text[:, 4]
    inputs = audio, text, temperature, bias, grad
    with through_kernels():
        ours = run(OURS, *inputs, kind, 0, 37)
    exact = run(PLAIN, *(None if x is None else x.double() for x in inputs), kind, 0, 37)
    # Scores of 1e5 are known to 1 / 128 in fp32, and weights to as many percent.
    for one, wanted in zip(ours, exact, strict=True):
        if wanted.numel():
            assert one.isfinite().all()
            assert (one.double() - wanted).abs().max() <= 0.05 * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_twice(small_tiles, kind):
    inputs = problem(kind, 1, 40, 20, torch.float32)
    with through_kernels():
        first, second = (run(OURS, *inputs, kind, 0, 40) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
