"""The Triton kernels of the codebooks' training against the definition."""

import math
from contextlib import nullcontext

import pytest
import torch

from musiclm_kernels import (
    implementations,
    reference,
    rvq_apply_statistics,
    rvq_ema_update,
    rvq_replacements,
    rvq_statistics,
)
from tests.ops.quantize_ema_cases import (
    DEVICE,
    GPU,
    NOBODY,
    averages,
    case,
    poisoned,
    running_kernels,
    update,
)

__all__ = ["poisoned"]  # a fixture
OPS = ("rvq_statistics", "rvq_replacements", "rvq_apply_statistics", "rvq_ema_update")


def test_there_are_kernels():
    for name in OPS:
        assert implementations()[name]["cuda"] == "triton"


def assert_kernels_compute_the_reference(x, codes, codebooks, dead_threshold=2.0, first_row=0):
    """Each step on the same inputs, in fp32; the sums also against float64."""
    size, total = averages(codebooks)
    options = {"decay": 0.9, "dead_threshold": dead_threshold}
    statistics = reference.rvq_statistics(x, codes, codebooks, seed=6, first_row=first_row)
    replaced = (x, codes, codebooks, size, statistics[0], statistics[2])
    fresh = reference.rvq_replacements(*replaced, first_row=first_row, **options)
    ours, theirs = ([y.clone() for y in (codebooks, size, total)] for _ in range(2))
    reference.rvq_apply_statistics(*theirs, *statistics[:2], fresh, **options)
    with running_kernels():
        counts, sums, draws = rvq_statistics(x, codes, codebooks, seed=6, first_row=first_row)
        ours_fresh = rvq_replacements(*replaced, first_row=first_row, **options)
        rvq_apply_statistics(*ours, *statistics[:2], fresh, **options)
    assert torch.equal(counts, statistics[0])
    assert torch.equal(draws, statistics[2])
    torch.testing.assert_close(sums, statistics[1], rtol=2e-7, atol=2**-35)
    assert torch.equal(ours_fresh, fresh)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
    return statistics, fresh


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"N": 1, "Q": 1, "K": 2, "D": 1},
        {"N": 70, "Q": 2, "K": 40, "D": 8},
        {"N": 9, "Q": 4, "K": 5, "D": 100},
        {"N": 5, "Q": 2, "K": 3, "D": 520},
        {"N": 40, "Q": 3, "q": 2},
        {"N": 300, "Q": 1, "K": 1100, "D": 3},  # more codes than a turn numbers at once
    ],
)
def test_kernels(poisoned, x_dtype, sizes):
    assert_kernels_compute_the_reference(*case(dtype=torch.float32, x_dtype=x_dtype, **sizes))


@pytest.mark.parametrize("first_row", [1000, 2**31 - 20, 2**32 - 40])
def test_kernels_with_rows_far_on(poisoned, first_row):
    _, fresh = assert_kernels_compute_the_reference(*case(dtype=torch.float32), first_row=first_row)
    assert fresh.any()


@pytest.mark.parametrize("layout", ["columns", "slices", "int32"])
def test_kernels_with_other_layouts(poisoned, layout):
    x, codes, codebooks = case(dtype=torch.float32, D=6)
    if layout == "columns":
        x, codes = x.T.contiguous().T, codes.T.contiguous().T
        codebooks = codebooks.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slices":
        x, codes = torch.cat([x, x], 1)[:, 3:9], torch.cat([codes, codes], 1)[:, :3]
        codebooks = torch.cat([codebooks, codebooks], 2)[..., :6]
        assert not x.is_contiguous() and not codes.is_contiguous()
    else:
        codes = codes.int()
    assert_kernels_compute_the_reference(x, codes, codebooks)


def test_kernels_where_every_code_is_dead_or_none(poisoned):
    inputs = case(dtype=torch.float32)
    _, fresh = assert_kernels_compute_the_reference(*inputs, dead_threshold=100.0)
    assert fresh.ne(0).any(2).all()
    _, fresh = assert_kernels_compute_the_reference(*inputs, dead_threshold=0.0)
    assert not fresh.any()


def test_kernels_where_a_level_or_nothing_has_codes(poisoned):
    x, codes, codebooks = case(dtype=torch.float32)
    codes[:, 1] = -1
    (counts, sums, draws), fresh = assert_kernels_compute_the_reference(x, codes, codebooks)
    assert not counts[1].any() and not sums[1].any() and draws[1].eq(NOBODY).all()
    assert fresh[0].any() and not fresh[1].any()
    for none in ((x, codes.fill_(-1)), (x[:0], codes[:0]), (x, codes[:, :0])):
        assert_kernels_compute_the_reference(*none, codebooks)
        with running_kernels():
            state = update(*none, codebooks, seed=3)
        for ours, before in zip(state, (codebooks, *averages(codebooks)), strict=True):
            assert torch.equal(ours, before)


@pytest.mark.parametrize("peak", [1e-38, 1e-30, 1e18, 3e38])
def test_kernels_at_the_ends_of_fp32(poisoned, peak):
    x, codes, codebooks = case(dtype=torch.float32)
    scale = peak / max(x.abs().max().item(), codebooks.abs().max().item())
    x, codebooks = x * scale, codebooks * scale
    codes = codes[:, :2].contiguous() if peak > 1e38 else codes
    plain = reference.rvq_statistics(x, codes, codebooks, seed=6)
    with running_kernels():
        ours = rvq_statistics(x, codes, codebooks, seed=6)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[2], plain[2])
    # No unit is finer than 2^-126. Where a sum overflows fp32, both have infinity.
    torch.testing.assert_close(ours[1], plain[1], rtol=2e-7, atol=max(2**-35 * peak, 40 * 2**-126))


def test_many_equal_rows_do_not_overflow(poisoned):
    x = torch.full((512, 2), 1.0 - 2**-24, device=DEVICE)
    codebooks = torch.zeros(2, 2, 2, device=DEVICE)
    codebooks[0, 1] = -1.0
    codes = torch.ones(512, 2, dtype=torch.int64, device=DEVICE)
    with running_kernels():
        _, sums, _ = rvq_statistics(x, codes, codebooks, seed=0)
    assert sums[0].tolist() == [[0, 0], [512 * (1 - 2**-24)] * 2]
    assert sums[1].tolist() == [[0, 0], [1024.0] * 2]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_counts_nowhere(poisoned, value, kernels):
    x, codes, codebooks = case(dtype=torch.float32)
    x[3, 1], x[30, 4] = value, value
    without = codes.clone()
    without[[3, 30]] = -1
    plain = x.clone()
    plain[[3, 30]] = 0
    with running_kernels() if kernels else nullcontext():
        ours, wanted = (
            [*rvq_statistics(*inputs, codebooks, seed=1), *update(*inputs, codebooks, seed=1)]
            for inputs in ((x, codes), (plain, without))
        )
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_codebook_that_is_not_finite_ends_and_counts_only_above():
    x, codes, codebooks = case(dtype=torch.float32)
    codebooks[1, 0] = math.nan
    with running_kernels():
        counts, sums, _ = rvq_statistics(x, codes, codebooks, seed=1)
        update(x, codes, codebooks, seed=1)
    plain = reference.rvq_statistics(x, codes, codebooks, seed=1)
    assert torch.equal(counts, plain[0]) and sums.isfinite().all()
    assert counts[2].sum() < (codes[:, 2] >= 0).sum()


def test_kernels_give_the_same_bits_in_any_order():
    x, codes, codebooks = case(dtype=torch.float32, N=64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(9))
    with running_kernels():
        first, second = (update(x, codes, codebooks, seed=1) for _ in range(2))
        counts, sums, _ = rvq_statistics(x, codes, codebooks, seed=1)
        shuffled = rvq_statistics(x[order], codes[order], codebooks, seed=1)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(counts, shuffled[0]) and torch.equal(sums, shuffled[1])


def test_kernels_update_as_the_definition_does(poisoned):
    inputs = case(dtype=torch.float32, N=100, K=20, D=8)
    theirs = update(*inputs, seed=8)
    with running_kernels():
        ours = update(*inputs, seed=8)
        tensor_seed = update(*inputs, seed=torch.tensor(8, device=DEVICE))
    for one, other, third in zip(ours, theirs, tensor_seed, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
        assert torch.equal(one, third)


def test_kernels_write_into_views():
    x, codes, codebooks = case(dtype=torch.float32)
    size, total = averages(codebooks)
    wanted = update(x, codes, codebooks, seed=2)
    wide = [torch.stack([y, y], -1) for y in (codebooks, size, total)]
    with running_kernels():
        views = [y[..., 0] for y in wide]
        rvq_ema_update(x, codes, *views, decay=0.9, dead_threshold=2.0, seed=2)
    for ours, theirs, before in zip(wide, wanted, (codebooks, size, total), strict=True):
        torch.testing.assert_close(ours[..., 0], theirs, rtol=2e-6, atol=1e-6)
        assert torch.equal(ours[..., 1], before)


def test_no_launcher_looks_at_the_device(monkeypatch):
    """On "meta" tensors, which hold nothing to look at, every launcher still launches all it has."""
    averages_module = pytest.importorskip("musiclm_kernels.quantize.ema_averages")
    statistics_module = pytest.importorskip("musiclm_kernels.quantize.ema_statistics")
    launched = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.name)

    for module in (statistics_module, averages_module):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(name))
    x, codes, codebooks = (y.to("meta") for y in case(dtype=torch.float32))
    size, seed = codebooks[..., 0].contiguous(), torch.empty((), dtype=torch.int64, device="meta")
    averages_module.rvq_ema_update(
        codebooks, size, codebooks.clone(), x, codes, seed, 0.9, 2.0, 1e-5
    )
    assert launched == [
        "_peak_kernel", "_statistics_kernel", "_collect_kernel", "_turns_kernel",
        "_replacements_kernel", "_totals_kernel", "_apply_kernel",
    ]  # fmt: skip


@pytest.mark.skipif(not GPU, reason="graphs are CUDA's")
def test_a_graph_holds_an_update():
    x, codes, codebooks = case(dtype=torch.float32)
    seed = torch.tensor(1, device=DEVICE)
    state = [y.clone() for y in (codebooks, *averages(codebooks))]
    options = {"decay": 0.9, "dead_threshold": 2.0, "seed": seed}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        rvq_ema_update(x, codes, *[y.clone() for y in state], **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rvq_ema_update(x, codes, *state, **options)
    for step_seed in (5, 6):
        for y, start in zip(state, (codebooks, *averages(codebooks)), strict=True):
            y.copy_(start)
        seed.fill_(step_seed)
        graph.replay()
        for ours, theirs in zip(state, update(x, codes, codebooks, seed=step_seed), strict=True):
            assert torch.equal(ours, theirs)
