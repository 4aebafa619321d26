import math
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from musiclm_kernels import (
    reference,
    rvq_apply_statistics,
    rvq_ema_update,
    rvq_encode,
    rvq_replacements,
    rvq_statistics,
)
from tests.ops.quantize_ema_cases import (
    DEVICE,
    NOBODY,
    averages,
    case,
    poisoned,
    running_kernels,
    update,
)

__all__ = ["poisoned"]  # a fixture


def residuals_by_loops(x, codes, codebooks):
    """[q, N, D]: what is left of each vector before each level."""
    left = torch.empty(codes.shape[1], *x.shape, dtype=codebooks.dtype)
    for n in range(len(x)):
        residual = x[n].to(codebooks.dtype).cpu()
        for level in range(codes.shape[1]):
            left[level, n] = residual
            if codes[n, level] >= 0:
                residual = residual - codebooks[level, codes[n, level]].cpu()
    return left


def ema_by_loops(x, codes, codebooks, size, total, decay, eps):
    """The update without replacement, one vector at a time; returns new tensors."""
    book, size, total = codebooks.clone(), size.clone(), total.clone()
    K = codebooks.shape[1]
    left = residuals_by_loops(x, codes, codebooks)
    for level in range(codes.shape[1]):
        counts, sums = torch.zeros_like(size[level]), torch.zeros_like(total[level])
        for n in range(len(x)):
            if codes[n, level] >= 0:
                counts[codes[n, level]] += 1
                sums[codes[n, level]] += left[level, n].to(sums)
        if counts.sum() == 0:
            continue
        size[level] = decay * size[level] + (1 - decay) * counts
        total[level] = decay * total[level] + (1 - decay) * sums
        n = size[level].sum()
        book[level] = total[level] / ((size[level] + eps) / (n + K * eps) * n)[:, None]
    return book, size, total


def rows_taken(replacements, x, codes, codebooks):
    """Per level, which row each replaced code became."""
    left = residuals_by_loops(x, codes, codebooks)
    taken = []
    for level, residual in enumerate(left):
        distances = torch.cdist(replacements[level].cpu(), residual)
        taken.append(distances.argmin(1).tolist())
        assert torch.equal(replacements[level].cpu(), residual[taken[-1]])
    return taken


@pytest.mark.parametrize("function", [rvq_ema_update, reference.rvq_ema_update])
def test_ema_matches_loops(function):
    x, codes, codebooks = case()
    codes[10:, 2] = -1
    codes[20:, 1] = -1
    size, total = averages(codebooks)
    wanted = ema_by_loops(x, codes, codebooks, size, total, 0.9, 1e-3)
    function(x, codes, codebooks, size, total, decay=0.9, dead_threshold=0, seed=0, eps=1e-3)
    for ours, theirs in zip((codebooks, size, total), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_draws_are_philox_of_level_and_row():
    """The draws against Triton's generator, and the least key by a loop."""
    tl = pytest.importorskip("triton.language")
    triton = pytest.importorskip("triton")

    @triton.jit
    def words(out_ptr, seed, level, ROWS: tl.constexpr):
        row = tl.arange(0, ROWS).to(tl.uint32) + 7
        zero = tl.zeros_like(row)
        first, second, _, _ = tl.philox(seed, row, zero + level, zero, zero)
        tl.store(out_ptr + tl.arange(0, ROWS), first.to(tl.int64))
        tl.store(out_ptr + ROWS + tl.arange(0, ROWS), second.to(tl.int64))

    x, codes, codebooks = case(N=32)
    draws = rvq_statistics(x, codes, codebooks, seed=2**40 + 3, first_row=7)[2]
    for level in range(3):
        out = torch.empty(2, 32, dtype=torch.int64, device=DEVICE)
        words[(1,)](out, 2**40 + 3, level, ROWS=32)
        wanted = [NOBODY] * 12
        for n, (first, second) in enumerate(out.T.tolist()):
            if codes[n, level] >= 0:
                slot = first * 12 // 2**32
                wanted[slot] = min(wanted[slot], (second // 2) * 2**32 + n + 7)
        assert draws[level].tolist() == wanted


def test_dead_codes_become_distinct_residuals_of_the_batch():
    x, codes, codebooks = case()
    before = codebooks.clone()
    size, total = torch.zeros_like(codebooks[..., 0]), codebooks.clone()
    size[:, :6] = 10.0
    codes[codes >= 6] = -1  # six dead codes a level, and six that are not
    counts = rvq_statistics(x, codes, codebooks, seed=0)[0].sum(1)
    rvq_ema_update(x, codes, codebooks, size, total, decay=0.9, dead_threshold=2.0, seed=5)
    for level, rows in enumerate(rows_taken(codebooks[:, 6:], x, codes, before)):
        assert len(set(rows)) == 6 and codes[rows, level].ge(0).all()
        fair = (0.9 * 60 + 0.1 * counts[level]) / 12
        torch.testing.assert_close(size[level, 6:], fair.expand(6))
        torch.testing.assert_close(total[level, 6:], fair * codebooks[level, 6:])
        assert size[level, :6].gt(2.0).all()


@pytest.mark.parametrize("num_coded", [1, 3, 200])
def test_replacements_come_in_turn_from_rows_with_a_code(num_coded):
    x, _, codebooks = case(N=200, Q=1, K=50)
    codes = torch.full((200, 1), -1, device=DEVICE)
    coded = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:num_coded]
    codes[coded] = 0
    before = codebooks.clone()
    size, total = averages(codebooks)
    draws = rvq_statistics(x, codes, codebooks, seed=1)[2][0]
    winners = [draw % 2**32 for draw in draws.tolist() if draw != NOBODY]
    assert len(winners) == len(set(winners)) <= min(num_coded, 50)
    assert len(winners) >= 0.5 * min(num_coded, 50)
    rvq_ema_update(x, codes, codebooks, size, total, decay=0.5, dead_threshold=900.0, seed=1)
    (rows,) = rows_taken(codebooks, x, codes, before)
    assert rows == [winners[k % len(winners)] for k in range(50)]
    assert set(winners) <= set(coded.tolist())


def test_every_row_is_drawn_as_often():
    x, _, codebooks = case(N=60, Q=1, K=6)
    codes = torch.zeros(60, 1, dtype=torch.int64, device=DEVICE)
    draws = torch.cat([rvq_statistics(x, codes, codebooks, seed=s)[2] for s in range(400)])
    counts = torch.bincount((draws[draws != NOBODY] % 2**32).cpu(), minlength=60)
    expected = counts.sum().item() / 60
    assert expected == pytest.approx(40, abs=0.1)
    assert (counts - expected).square().sum() / expected < 100  # chi-squared of 59: p < 0.001


def test_the_seed_chooses_and_the_generator_does_not():
    inputs = case()
    first = update(*inputs, seed=1)[0]
    torch.manual_seed(77)
    assert torch.equal(update(*inputs, seed=1)[0], first)
    assert torch.equal(update(*inputs, seed=torch.tensor(1, device=DEVICE))[0], first)
    others = [update(*inputs, seed=seed)[0] for seed in (2, 2**62, -1, 2**33 + 1)]
    assert not any(torch.equal(first, other) for other in others)


def test_a_level_that_no_row_reached_stays():
    x, codes, codebooks = case()
    codes[:, 1:] = -1
    size, total = averages(codebooks)
    before = [y.clone() for y in (codebooks, size, total)]
    for rows, some in ((x, codes), (x, codes[:, :1]), (x[:0], codes[:0]), (x, codes[:, :0])):
        rvq_ema_update(rows, some, codebooks, size, total, decay=0.9, dead_threshold=2.0, seed=0)
        for ours, theirs in zip((codebooks, size, total), before, strict=True):
            assert torch.equal(ours[1:], theirs[1:])
    assert not torch.equal(codebooks[0], before[0][0])


def test_training_on_clusters_finds_them():
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.randn(8, 4, generator=generator)
    codebooks = torch.randn(1, 32, 4, generator=generator)  # a few to spare: no local optimum
    size, total = torch.ones(1, 32), codebooks.clone()
    for step in range(60):
        noise = 0.01 * torch.randn(256, 4, generator=generator)
        x = centres[torch.randint(8, (256,), generator=generator)] + noise
        codes, _ = rvq_encode(x, codebooks)
        rvq_ema_update(x, codes, codebooks, size, total, decay=0.8, dead_threshold=1.0, seed=step)
    assert torch.cdist(centres, codebooks[0]).amin(1).max() < 0.1


def update_in_parts(x, codes, codebooks, cuts, *, seed, decay=0.9, dead_threshold=2.0, eps=1e-5):
    """What processes with a part of the batch each do, their sums taken here."""
    parts = list(zip([0, *cuts], [*cuts, len(x)], strict=True))
    state = [y.clone() for y in (codebooks, *averages(codebooks))]
    statistics = [
        rvq_statistics(x[a:b], codes[a:b], codebooks, seed=seed, first_row=a) for a, b in parts
    ]
    counts, sums, draws = (torch.stack(part) for part in zip(*statistics, strict=True))
    counts, sums, draws = counts.sum(0), sums.sum(0), draws.amin(0)
    replacements = [
        rvq_replacements(
            x[a:b], codes[a:b], codebooks, state[1], counts, draws,
            decay=decay, dead_threshold=dead_threshold, first_row=a,
        )
        for a, b in parts
    ]  # fmt: skip
    assert (torch.stack(replacements) != 0).any(2).any(1).any(1).all(), "each part gives some"
    rvq_apply_statistics(
        *state, counts, sums, sum(replacements),
        decay=decay, dead_threshold=dead_threshold, eps=eps,
    )  # fmt: skip
    return state


@pytest.mark.parametrize("cuts", [[20], [7, 30]])
@pytest.mark.parametrize("kernels", [False, True])
def test_parts_of_a_batch_give_what_the_batch_gives(poisoned, cuts, kernels):
    inputs = case(dtype=torch.float32)
    with running_kernels() if kernels else nullcontext():
        ours = update_in_parts(*inputs, cuts, seed=4)
        theirs = update(*inputs, seed=4)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    size = averages(inputs[2])[0]
    counts = rvq_statistics(*inputs, seed=4)[0]
    dead = 0.9 * size + 0.1 * counts < 2.0
    assert torch.equal(ours[0][dead], theirs[0][dead])


# The ops.


@pytest.mark.parametrize("kernels", [False, True])
def test_op_contracts(kernels):
    x, codes, codebooks = case(dtype=torch.float32)
    size, total = averages(codebooks)
    seed = torch.tensor(7, device=DEVICE)
    ops = torch.ops.musiclm
    counts, sums, draws = rvq_statistics(x, codes, codebooks, seed=7)
    with running_kernels() if kernels else nullcontext():
        columns = codebooks.transpose(1, 2).contiguous().transpose(1, 2)
        for books in (codebooks,) if kernels else (codebooks, columns):
            calls = {
                ops.rvq_statistics: (books, x.half(), codes.int(), seed, 5),
                ops.rvq_replacements: (books, x, codes, size, counts, draws, 0.9, 1.5, 0),
                ops.rvq_apply_statistics: (
                    books.clone(), size.clone(), total.clone(), counts, sums, sums, 0.9, 1.5, 1e-5,
                ),
                ops.rvq_ema_update: (
                    books.clone(), size.clone(), total.clone(), x, codes, seed, 0.9, 1.5, 1e-5,
                ),
            }  # fmt: skip
            for op, arguments in calls.items():
                torch.library.opcheck(op.default, arguments)


def step(x, codebooks, size, total, seed):
    codes, _ = rvq_encode(x, codebooks)
    statistics = rvq_statistics(x, codes, codebooks, seed=seed)
    rvq_ema_update(x, codes, codebooks, size, total, decay=0.9, dead_threshold=1.0, seed=seed)
    options = {"decay": 0.9, "dead_threshold": 1.0}
    fresh = rvq_replacements(x, codes, codebooks, size, statistics[0], statistics[2], **options)
    rvq_apply_statistics(codebooks, size, total, *statistics[:2], fresh, **options)
    return statistics


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_break_or_guard_on_the_seed(backend):
    x, _, codebooks = case(dtype=torch.float32)
    size, total = averages(codebooks)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(3):
        seed = torch.tensor(seed, device=DEVICE)
        ours, theirs = ([y.clone() for y in (codebooks, size, total)] for _ in range(2))
        torch.testing.assert_close(compiled(x, *ours, seed), step(x, *theirs, seed))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
        assert not torch.equal(ours[0], codebooks)
    assert counter.frame_count == 1
    ours, theirs = ([y.clone() for y in (codebooks, size, total)] for _ in range(2))
    torch.testing.assert_close(compiled(x, *ours, 3), step(x, *theirs, 3))


X, BOOKS = torch.zeros(4, 5), torch.zeros(3, 7, 5)
CODES, SIZES = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(3, 7)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x": X[0]}, "x has shape"),
        ({"x": X.long()}, "x is torch.int64"),
        ({"codes": CODES[:3]}, "codes has 3 rows, wanted 4"),
        ({"codes": CODES + 7}, "codes span 7 to 7"),
        ({"codes": CODES - 2}, "codes span -2 to -2"),
        ({"codebooks": BOOKS.half()}, "codebooks is torch.float16"),
        ({"cluster_size": torch.zeros(3, 6)}, "cluster_size has shape"),
        ({"cluster_sum": BOOKS.double()}, "cluster_sum is torch.float64"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"dead_threshold": -1.0}, "dead_threshold is -1.0"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"decay": math.nan}, "decay is nan"),
        ({"dead_threshold": math.inf}, "dead_threshold is inf"),
        ({"dead_threshold": math.nan}, "dead_threshold is nan"),
        ({"eps": math.inf}, "eps is inf"),
        ({"eps": math.nan}, "eps is nan"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed has shape"),
        ({"seed": torch.zeros(())}, "seed is torch.float32"),
    ],
)
def test_ema_refusals(change, name):
    arguments = {
        "x": X, "codes": CODES, "codebooks": BOOKS, "cluster_size": SIZES,
        "cluster_sum": BOOKS, "decay": 0.9, "dead_threshold": 0.0, "seed": 0,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=name):
        rvq_ema_update(**arguments)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rvq_statistics(X, CODES, BOOKS, seed=0, first_row=-1), "first_row is -1"),
        (lambda: rvq_statistics(X, CODES, BOOKS, seed=0, first_row=2**32 - 3), "first_row is"),
        (lambda: rvq_statistics(X, CODES[:3], BOOKS, seed=0), "codes has 3 rows"),
        (lambda: rvq_statistics(X, CODES, BOOKS.half(), seed=0), "codebooks is torch.float16"),
        (lambda: replacements(counts=SIZES[:2]), "counts has shape"),
        (lambda: replacements(draws=SIZES), "draws is torch.float32"),
        (lambda: replacements(cluster_size=SIZES.double()), "cluster_size is torch.float64"),
        (lambda: replacements(decay=-0.1), "decay is -0.1"),
        (lambda: apply(sums=BOOKS[:2]), "sums has shape"),
        (lambda: apply(counts=SIZES.double()), "counts is torch.float64"),
        (lambda: apply(replacements=BOOKS.half()), "replacements is torch.float16"),
        (lambda: apply(codebooks=BOOKS[0]), "codebooks has shape"),
        (lambda: apply(eps=-1.0), "eps is -1.0"),
    ],
)
def test_refusals_of_the_steps(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def replacements(**change):
    arguments = {
        "x": X, "codes": CODES, "codebooks": BOOKS, "cluster_size": SIZES, "counts": SIZES,
        "draws": SIZES.long(), "decay": 0.9, "dead_threshold": 0.0,
    } | change  # fmt: skip
    return rvq_replacements(**arguments)


def apply(**change):
    arguments = {
        "codebooks": BOOKS, "cluster_size": SIZES, "cluster_sum": BOOKS, "counts": SIZES,
        "sums": BOOKS, "replacements": BOOKS, "decay": 0.9, "dead_threshold": 0.0,
    } | change  # fmt: skip
    return rvq_apply_statistics(**arguments)
