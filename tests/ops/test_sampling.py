import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from musiclm_kernels import reference, sample_logits
from musiclm_kernels.philox import uniform
from musiclm_kernels.sampling import arithmetic_reference as arithmetic
from musiclm_kernels.sampling import reference as sampling_reference

SEEDS = torch.arange(4)
ROWS = torch.zeros(4, 37)


def logits(B=4, V=37, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(B, V, generator=generator, dtype=torch.float64)).to(dtype)


def by_loops(row, *, temperature, top_k, top_p, min_p, seed, step):
    """One row in plain Python: a set of survivors, then the Gumbel race."""
    V = len(row)
    scores = [value / temperature for value in row.tolist()]
    kept = set(range(V))
    if top_k:
        floor = sorted(scores, reverse=True)[min(top_k, V) - 1]
        kept = {c for c in kept if scores[c] >= floor}
    peak = max(scores)
    mass = sum(math.exp(scores[c] - peak) for c in kept)
    nucleus, total = set(), 0.0
    for c in sorted(kept, key=lambda c: -scores[c]):
        if total >= top_p:
            break
        nucleus.add(c)
        total += math.exp(scores[c] - peak) / mass
    kept = {c for c in nucleus if math.exp(scores[c] - peak) >= min_p}
    noise = {c: uniform(seed, torch.tensor(step * V + c)).item() for c in kept}
    return max(kept, key=lambda c: scores[c] - math.log(-math.log(noise[c])))


@pytest.mark.parametrize("function", [sample_logits, reference.sample_logits])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_matches_loops(function, filters):
    rows = logits()
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    for step in range(6):
        tokens = function(rows, **filters, seeds=SEEDS, step=step)
        assert tokens.dtype == torch.int64
        wanted = [by_loops(rows[b], **full, seed=b, step=step) for b in range(4)]
        assert tokens.tolist() == wanted
        assert function(rows.float(), **filters, seeds=SEEDS, step=step).tolist() == wanted


def test_frequencies_are_the_softmax():
    row = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    draws = 40_000
    tokens = sample_logits(row.expand(draws, 5), temperature=1.5, seeds=torch.arange(draws), step=0)
    frequencies = torch.bincount(tokens, minlength=5) / draws
    assert (frequencies - (row / 1.5).softmax(0)).abs().max() < 5 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_pass_a_chi_square_test_against_the_softmax(dtype, temperature):
    row = torch.linspace(-3.5, 2, 16, dtype=dtype)
    draws = 200_000
    tokens = sample_logits(
        row.expand(draws, 16), temperature=temperature, seeds=torch.arange(draws), step=5
    )
    counts = torch.bincount(tokens, minlength=16).double()
    expected = draws * (row.double() / temperature).softmax(0)
    assert expected.min() > 20
    statistic = ((counts - expected).square() / expected).sum()
    assert statistic < 44.3  # 15 degrees of freedom: p 1e-4


def test_filters_bound_what_is_drawn():
    row = logits(1)
    many, seeds = row.expand(2000, 37), torch.arange(2000)
    ranked = row[0].argsort(descending=True).tolist()
    drawn = set(sample_logits(many, top_k=3, seeds=seeds, step=0).tolist())
    assert drawn <= set(ranked[:3]) and len(drawn) > 1
    assert set(sample_logits(many, top_k=1, seeds=seeds, step=0).tolist()) == {ranked[0]}
    assert set(sample_logits(many, min_p=1.0, seeds=seeds, step=0).tolist()) == {ranked[0]}


@pytest.mark.parametrize(
    "top_p, kept", [(0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.91, 4), (1.0, 4)]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    row = torch.tensor([0.15, 0.5, 0.1, 0.25]).log()
    many, seeds = row.expand(500, 4), torch.arange(500)
    drawn = set(sample_logits(many, top_p=top_p, seeds=seeds, step=0).tolist())
    assert drawn == set([1, 3, 0, 2][:kept])


def test_a_draw_of_zero_does_not_beat_the_filters(monkeypatch):
    monkeypatch.setattr(
        "musiclm_kernels.sampling.reference.uniform",
        lambda seed, offset: torch.zeros(torch.broadcast_shapes(seed.shape, offset.shape)),
    )
    allowed = torch.arange(37) == 11
    assert sample_logits(logits(), seeds=SEEDS, step=0, allowed=allowed).eq(11).all()


def test_temperature_zero_takes_the_largest_and_the_lowest_of_ties():
    rows = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 5.0]])
    tokens = sample_logits(rows, temperature=0, top_k=1, seeds=SEEDS[:3], step=0)
    assert tokens.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 1e-60, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_a_tiny_temperature_is_greedy(dtype, temperature, filters):
    rows = torch.tensor([[1, 2, 3], [-3, -2, -torch.inf], [6e4, -6e4, 0]], dtype=dtype)
    settings = {"temperature": temperature, "seeds": SEEDS[:3], "step": 0, **filters}
    assert sample_logits(rows, **settings).tolist() == [2, 1, 0]


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e300])
def test_only_allowed_tokens(per_row, temperature):
    rows = logits(64)
    allowed = torch.rand(64, 37, generator=torch.Generator().manual_seed(1)) > 0.7
    allowed[:, 11] = True
    allowed = allowed if per_row else allowed[0]
    seeds = torch.arange(64)
    tokens = sample_logits(rows, temperature=temperature, seeds=seeds, step=2, allowed=allowed)
    assert allowed.expand(64, 37).gather(1, tokens[:, None]).all()
    only = torch.zeros(37, dtype=torch.bool)
    only[11] = True
    assert sample_logits(rows, seeds=seeds, step=2, allowed=only).eq(11).all()


def test_a_row_that_allows_nothing_gives_token_zero():
    none = torch.zeros(37, dtype=torch.bool)
    for filters in ({}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}):
        assert sample_logits(logits(), **filters, seeds=SEEDS, step=0, allowed=none).eq(0).all()


def test_guidance_mixes_before_the_filters():
    rows, base = logits(), logits(seed=1)
    settings = {"top_k": 5, "temperature": 0.8, "seeds": SEEDS, "step": 3}
    guided = sample_logits(rows, unconditional=base, guidance_scale=2.5, **settings)
    assert torch.equal(guided, sample_logits(base + 2.5 * (rows - base), **settings))
    ruled_out = rows.clone()
    ruled_out[:, :36] = -torch.inf
    for scale in (0.0, 1.0, 3.0):
        tokens = sample_logits(
            ruled_out, unconditional=base, guidance_scale=scale, seeds=SEEDS, step=0
        )
        assert tokens.eq(36).all()


def test_a_row_depends_on_itself_its_seed_and_the_step_alone():
    rows = logits(dtype=torch.float32)
    settings = {"top_p": 0.95, "temperature": 1.3}
    together = torch.stack(
        [sample_logits(rows, seeds=SEEDS + 5, step=step, **settings) for step in range(20)]
    )
    torch.manual_seed(99)
    order = torch.tensor([2, 0])
    apart = torch.stack(
        [
            sample_logits(rows[order], seeds=SEEDS[order] + 5, step=step, **settings)
            for step in range(20)
        ]
    )
    assert torch.equal(apart, together[:, order])
    same = torch.stack(
        [sample_logits(rows[:1].expand(4, 37), seeds=SEEDS, step=step) for step in range(20)]
    )
    assert len({tuple(column) for column in same.mT.tolist()}) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_fp32(dtype):
    rows = logits(dtype=dtype)
    settings = {"top_p": 0.9, "temperature": 0.7, "seeds": SEEDS, "step": 1}
    assert torch.equal(sample_logits(rows, **settings), sample_logits(rows.float(), **settings))


def test_large_steps_and_seeds():
    seeds = torch.tensor([2**63 - 1, -1, 2**32, 0])
    first, later = (sample_logits(logits(), seeds=seeds, step=step) for step in (2**31, 2**40))
    assert first.shape == later.shape == (4,)


def test_one_column_and_no_rows():
    assert sample_logits(torch.zeros(4, 1), seeds=SEEDS, step=0).eq(0).all()
    assert sample_logits(torch.zeros(0, 5), top_p=0.5, seeds=SEEDS[:0], step=0).shape == (0,)


def test_op_contract():
    op, rows = torch.ops.musiclm.sample_logits.default, logits(dtype=torch.float32)
    allowed = torch.ones(37, dtype=torch.bool)
    torch.library.opcheck(op, (rows, 0.8, 5, 0.9, 0.01, 2.0, rows, SEEDS, 3, None, allowed))
    torch.library.opcheck(op, (rows, 1.0, 0, 1.0, 0.0, None, None, SEEDS, 0, torch.tensor(3), None))


def test_compiles_once_for_every_step():
    rows, counter = logits(), CompileCounter()
    counted = torch.compile(
        lambda step: sample_logits(rows, seeds=SEEDS, step=step), fullgraph=True, backend=counter
    )
    for step in range(2, 12):
        counted(step)
    assert counter.frame_count <= 2  # once as a constant, once as a symbol


def test_compiles_without_graph_break():
    rows = logits(dtype=torch.float32)
    compiled = torch.compile(
        lambda rows: sample_logits(rows * 2, top_k=5, seeds=SEEDS, step=3) + 1, fullgraph=True
    )
    wanted = sample_logits(rows * 2, top_k=5, seeds=SEEDS, step=3) + 1
    assert torch.equal(compiled(rows), wanted)


@pytest.mark.parametrize("step", [0, 7, 2**31 + 1, 2**40])
def test_a_step_on_the_device_is_the_same_step(step):
    wanted = sample_logits(logits(), top_k=9, seeds=SEEDS, step=step)
    for steps in (torch.tensor(step), torch.full((4,), step)):
        assert torch.equal(sample_logits(logits(), top_k=9, seeds=SEEDS, step=steps), wanted)
    steps = torch.tensor([step, 1, 2, 3])
    apart = [
        sample_logits(logits()[b : b + 1], seeds=SEEDS[b : b + 1], step=int(steps[b]))
        for b in range(4)
    ]
    assert torch.equal(sample_logits(logits(), seeds=SEEDS, step=steps), torch.cat(apart))


# The float rule.


def ulps(ours, exact):
    """The largest error, in units of the last place of a float32."""
    spacing = torch.finfo(torch.float32).eps * 2.0 ** exact.abs().log2().floor()
    return ((ours.double() - exact).abs() / spacing).max().item()


def test_the_logarithm_is_right_to_a_unit_in_the_last_place():
    everywhere = torch.arange(0x00800000, 0x7F800000, 523, dtype=torch.int32).view(torch.float32)
    around_one = torch.arange(0x3F000000, 0x40000000, 7, dtype=torch.int32).view(torch.float32)
    for x in (everywhere, around_one[around_one != 1]):
        assert ulps(arithmetic.log(x), x.double().log()) < 0.9
    assert arithmetic.log(torch.ones(1)).item() == 0
    x = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    assert torch.equal(arithmetic.log(x), x.log())


def test_mass_is_right_to_a_unit():
    deficits = torch.cat([torch.arange(0, 40, 1e-5), torch.tensor([1e-30, 1e30, torch.inf])])
    exact = torch.exp(-deficits.double()) * 2**arithmetic.MASS_BITS
    assert (arithmetic.mass(deficits) - exact).abs().max() < 0.8
    assert arithmetic.mass(torch.tensor([0.0, 17.4, torch.inf])).tolist() == [2**23, 0, 0]
    assert torch.equal(arithmetic.mass(deficits.double()), torch.exp(-deficits.double()))


def test_masses_are_halved_until_they_fit():
    rows = torch.full((3, 1000), 2**23)
    rows[1, 100:], rows[2] = 0, 0
    rows[0, 0] = 2**22
    fitted = arithmetic.fit(rows)
    assert torch.equal(fitted[1:], rows[1:]) and torch.equal(fitted[0], rows[0] >> 2)
    assert 2**30 <= fitted[0].sum() < 2**31


@pytest.mark.parametrize("flatness", [1e-3, 0.3, 3.0])
def test_the_nucleus_is_the_one_of_float64(flatness):
    """Where the last token in and the first one out are told apart by more than the rule rounds."""
    generator = torch.Generator().manual_seed(2)
    rows = flatness * torch.randn(20, 16384, generator=generator)
    for top_p in (0.3, 0.9, 0.999):
        deficits = rows.amax(1, keepdim=True) - rows
        ours = sampling_reference._nucleus_threshold(deficits, top_p)
        probabilities = (-deficits.double()).softmax(1)
        held = torch.where(deficits <= ours, probabilities, 0).sum(1)
        below = torch.where(deficits < ours, probabilities, 0).sum(1)
        assert (held > top_p - 2e-5).all() and (below < top_p + 2e-5).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}])
def test_the_compiler_finds_the_same_tokens(filters):
    rows, base = logits(300, 130, torch.float32), logits(300, 130, torch.float32, seed=1)
    rows[1::7, ::2] = -torch.inf
    rows[2::7] = rows[2::7].round()
    settings = {"temperature": 1.3, "guidance_scale": 2.3, "seeds": torch.arange(300), **filters}
    compiled = torch.compile(
        lambda rows, base, step: sample_logits(rows, unconditional=base, step=step, **settings),
        fullgraph=True,
    )
    for step in (torch.tensor(3), torch.tensor(2**33)):
        wanted = sample_logits(rows, unconditional=base, step=step, **settings)
        assert torch.equal(compiled(rows, base, step), wanted)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"logits": torch.zeros(37)}, "logits has shape"),
        ({"logits": torch.zeros(4, 37, dtype=torch.int64)}, "logits is torch.int64"),
        ({"logits": torch.zeros(4, 0)}, "logits has shape"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2**63}, "top_k is 9223372036854775808"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"step": -1}, "step is -1"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, "step has shape"),
        ({"step": torch.tensor(1.0)}, "step is torch.float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds has shape"),
        ({"seeds": torch.zeros(4, dtype=torch.int32)}, "seeds is torch.int32"),
        ({"guidance_scale": 2.0}, "unconditional is None"),
        ({"unconditional": torch.zeros(4, 37)}, "guidance_scale is None"),
        ({"unconditional": ROWS, "guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"unconditional": ROWS, "guidance_scale": -math.inf}, "guidance_scale is -inf"),
        ({"unconditional": torch.zeros(4, 36), "guidance_scale": 2.0}, "unconditional has shape"),
        ({"allowed": torch.ones(36, dtype=torch.bool)}, "allowed has shape"),
        ({"allowed": torch.ones(37)}, "allowed is torch.float32"),
    ],
)
def test_refusals(change, name):
    arguments = {"logits": logits(dtype=torch.float32), "seeds": SEEDS, "step": 0} | change
    with pytest.raises(ValueError, match=name):
        sample_logits(**arguments)
