"""The kernel of sample_logits, in the interpreter: exactly the tokens that the CPU draws."""

import pytest
import torch

from musiclm_kernels import implementations, sample_logits
from musiclm_kernels.philox import uniform
from musiclm_kernels.sampling import arithmetic_reference as arithmetic
from musiclm_kernels.sampling.reference import SMALLEST_UNIFORM
from musiclm_kernels.testing import through_kernels

triton = pytest.importorskip("triton")
import triton.language as tl

from musiclm_kernels.sampling import tile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs compiled there instead")

ALL = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
FILTERS = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.95},
    ALL,
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Tokens that nobody writes are none of the vocabulary."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(123456789))


def awkward_logits(V, seed=0, dtype=torch.float32):
    """Eight rows: plain, tied, half ruled out, flat, nearly flat, steep, one token, none."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * torch.randn(8, V, generator=generator)
    rows[1] = rows[1].round()
    rows[2, ::2] = -torch.inf
    rows[3] = 1.5
    rows[4] *= 1e-5
    rows[5] *= 1e3
    rows[6, 1:] = -torch.inf
    rows[7] = -torch.inf
    return rows.to(dtype)


def assert_same_tokens(rows, **settings):
    wanted = sample_logits(rows, **settings)
    with through_kernels():
        ours = sample_logits(rows, **settings)
    assert ours.dtype == torch.int64 and torch.equal(ours, wanted)


def draws(B=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (B,), generator=generator)
    return {"seeds": seeds, "step": torch.randint(0, 2**34, (B,), generator=generator)}


@triton.jit
def _arithmetic(
    x_ptr, log_ptr, mass_ptr, fitted_ptr, noise_ptr, ROWS: tl.constexpr, V: tl.constexpr
):
    at = tl.arange(0, ROWS)[:, None] * V + tl.arange(0, V)[None, :]
    x = tl.load(x_ptr + at)
    mass = tile.mass(x)
    tl.store(log_ptr + at, tile.log(x))
    tl.store(mass_ptr + at, mass)
    tl.store(fitted_ptr + at, tile.fit(mass))
    tl.store(
        noise_ptr + at,
        tile.minus_noise(tl.arange(0, ROWS)[:, None].to(tl.int64), at.to(tl.int64) + 2**40),
    )


def test_the_arithmetic_of_both_twins_is_the_same_to_the_bit():
    ROWS, V = 8, 16384
    bits = torch.randint(0x00800000, 0x7F800000, (ROWS, V), dtype=torch.int32)
    x = bits.view(torch.float32)
    x[1:4] = 20 * torch.rand(3, V)
    x[4:6] = 1e-2 * torch.rand(2, V)
    x[6] = 2 * torch.rand(V) + 1e-7
    x[7] = torch.linspace(3, 4, V)
    log, noise = torch.empty(ROWS, V), torch.empty(ROWS, V)
    mass, fitted = (torch.empty(ROWS, V, dtype=torch.int32) for _ in range(2))
    _arithmetic[(1,)](x, log, mass, fitted, noise, ROWS, V)
    assert torch.equal(log, arithmetic.log(x))
    assert torch.equal(mass.long(), arithmetic.mass(x))
    assert torch.equal(fitted.long(), arithmetic.fit(arithmetic.mass(x)))
    assert not torch.equal(fitted[4:6], mass[4:6])
    columns = torch.arange(ROWS * V).view(ROWS, V) + 2**40
    u = uniform(torch.arange(ROWS)[:, None], columns).clamp_min(SMALLEST_UNIFORM)
    assert torch.equal(noise, arithmetic.log(-arithmetic.log(u)))


def test_there_is_a_kernel():
    assert implementations()["sample_logits"]["cuda"] == "triton"


@pytest.mark.parametrize("V", [1, 2, 37, 128, 129, 1025])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_are_the_same(V, filters):
    assert_same_tokens(awkward_logits(V), **filters, **draws())


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, ALL], ids=str)
def test_hundreds_of_rows(filters):
    for seed in range(8):
        assert_same_tokens(awkward_logits(200, seed), **filters, **draws(seed=seed))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_guidance_and_allowed(filters, per_row):
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(8, 60, generator=generator) > 0.4
    unconditional = torch.randn(8, 60, generator=generator)
    for scale in (0.0, 1.0, -0.7, 3.3):
        assert_same_tokens(
            awkward_logits(60),
            **filters,
            **draws(),
            allowed=allowed if per_row else allowed[0],
            unconditional=unconditional,
            guidance_scale=scale,
        )


@pytest.mark.parametrize("top_k", [1, 2, 59, 60, 61, 2**63 - 1])
def test_every_k(top_k):
    assert_same_tokens(awkward_logits(60), top_k=top_k, **draws())


@pytest.mark.parametrize("top_p", [1e-9, 0.01, 0.5, 0.999999, 1 - 2**-30])
def test_every_p(top_p):
    assert_same_tokens(awkward_logits(60), top_p=top_p, **draws())


def test_a_mass_that_is_reached_exactly():
    rows = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(64, 4)
    masses = arithmetic.mass(rows[:1, :1] - rows[:1])
    assert masses.tolist() == [[2**23, 2**22, 2**21, 2**21]]
    for top_p, kept in ((0.5, 1), (0.5 + 2**-20, 2), (0.75, 2), (0.75 + 2**-20, 4)):
        settings = {"top_p": top_p, "seeds": torch.arange(64), "step": 0}
        assert sample_logits(rows, **settings).unique().tolist() == list(range(kept))
        assert_same_tokens(rows, **settings)


@pytest.mark.parametrize("temperature", [1e-60, 1e-39, 1e-6, 1e30, 1e300])
def test_extreme_temperatures(temperature):
    assert_same_tokens(awkward_logits(60), **ALL | {"temperature": temperature}, **draws())


def test_half_precision_and_strides():
    rows = awkward_logits(60, dtype=torch.float16)
    rows[0, 5] = torch.inf
    assert_same_tokens(rows, **ALL, **draws())
    wide = awkward_logits(120)
    for view in (wide[:, :60], wide[:, ::2], wide.T.contiguous().T):
        assert_same_tokens(
            view, **ALL, **draws(), unconditional=view.neg().clamp(-9, 9), guidance_scale=2
        )
    settings = draws(16)
    settings["seeds"] = settings["seeds"][::2]
    settings["step"] = settings["step"][1::2]
    assert_same_tokens(rows, **ALL, **settings)


@pytest.mark.parametrize("step", [0, 1, 2**35, torch.tensor(2**35)])
def test_every_kind_of_step(step):
    assert_same_tokens(awkward_logits(60), **ALL, seeds=torch.arange(8), step=step)


def test_masses_that_have_to_be_halved():
    rows = 1e-3 * torch.randn(2, 2000, generator=torch.Generator().manual_seed(5))
    assert arithmetic.mass(rows.amax(1, keepdim=True) - rows).sum(1).min() > 2**32
    for top_p in (0.1, 0.5, 0.97):
        assert_same_tokens(rows, top_p=top_p, **draws(2))


def test_a_row_does_not_depend_on_the_others():
    rows, settings = awkward_logits(60), draws()
    with through_kernels():
        together = sample_logits(rows, **ALL, **settings)
        for b in range(8):
            alone = {name: value[b : b + 1] for name, value in settings.items()}
            assert torch.equal(sample_logits(rows[b : b + 1], **ALL, **alone), together[b : b + 1])


def test_no_rows():
    assert_same_tokens(
        torch.zeros(0, 5), top_p=0.5, seeds=torch.zeros(0, dtype=torch.int64), step=0
    )


def test_rows_too_wide_for_the_kernel_are_refused():
    settings = {"seeds": torch.zeros(1, dtype=torch.int64), "step": 0}
    assert sample_logits(torch.zeros(1, 16385), **settings).shape == (1,)
    with through_kernels(), pytest.raises(ValueError, match="16385 columns, wanted at most 16384"):
        sample_logits(torch.zeros(1, 16385), **settings)


def test_the_op_contract_of_the_kernel():
    rows, seeds = awkward_logits(20), torch.arange(8)
    allowed = torch.ones(20, dtype=torch.bool)
    op = torch.ops.musiclm.sample_logits.default
    with through_kernels():
        torch.library.opcheck(
            op, (rows, 0.8, 5, 0.9, 0.01, 2.0, rows.nan_to_num(), seeds, 3, None, allowed)
        )
        torch.library.opcheck(op, (rows, 1.0, 0, 1.0, 0.0, None, None, seeds, 0, seeds, None))
