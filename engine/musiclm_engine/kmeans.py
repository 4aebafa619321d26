"""Lloyd's k-means, and that of each residual level in turn, over a data set that is streamed."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, distributed

from musiclm_kernels import random_words, rvq_encode, rvq_statistics

Stream = Callable[[], Iterable[Tensor]]

MAX_ROWS = 1 << 16  # of a tensor that are worked on at a time
LAST = torch.iinfo(torch.int64).max  # after every key and draw
ROW = 2**32 - 1  # the bits of a draw that number its row


def kmeans(
    batches: Tensor | Stream,
    num_clusters: int,
    *,
    seed: int,
    iterations: int = 25,
    group: "distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Centroids [K, D] that minimise the points' squared distance to the nearest of them.

    One level of `residual_kmeans`, which says what the arguments are.
    """
    return residual_kmeans(batches, 1, num_clusters, seed=seed, iterations=iterations, group=group)[
        0
    ]


@torch.no_grad()
def residual_kmeans(
    batches: Tensor | Stream,
    num_levels: int,
    codebook_size: int,
    *,
    seed: int,
    iterations: int = 25,
    group: "distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Codebooks for residual vector quantisation: k-means of what the levels before left over.

    A level starts from points drawn without repetition, and a cluster that no point chooses moves
    to a drawn point. Which points are drawn depends on the seed and on the points' order alone, so
    that how they are cut into batches changes the result by rounding at the most. Memory does not
    grow with the data set: it is read 1 + num_levels * (1 + iterations) times.

    Args:
        batches: the points: [N, D] floats, or what gives an iterable of such batches whenever it is
            called, the same points in the same order each time; all on the device to work on.
        num_levels: Q.
        codebook_size: K.
        seed: of the first centroids and of what replaces empty clusters, an int64.
        iterations: Lloyd steps a level.
        group: of processes that each hold a part of the data set; they count as one data set, in
            the order of their ranks, and all get its codebooks. None: this process has it all.

    Returns:
        [Q, K, D] float32, on the points' device. Distances are taken in the "fast" mode of
        `rvq_encode`, sums in float64.

    Raises:
        ValueError: a number below 1, batches that are not (N, D) floats of one D, that are not
            finite, that hold fewer points than codebook_size (in a group: none in a process), or
            that change from one reading to the next.

    Source: Lloyd (1982), "Least squares quantization in PCM"; the first centroids after Forgy.
    """
    if min(num_levels, codebook_size, iterations) < 1:
        raise ValueError(
            f"num_levels is {num_levels}, codebook_size {codebook_size}, iterations {iterations}, "
            "wanted each at least 1"
        )
    stream: Stream = partial(batches.split, MAX_ROWS) if isinstance(batches, Tensor) else batches
    counts, width, device = _survey(stream, codebook_size, group)
    rank = distributed.get_rank(group) if group else 0
    first_row, num_rows = sum(counts[:rank]), counts[rank]
    codebooks = torch.empty(num_levels, codebook_size, width, device=device)
    done = 0  # levels that the stream's points have behind them
    for level in range(num_levels):
        points = partial(_residuals, stream, codebooks[done:level], first_row, num_rows)
        codebooks[level] = _sample(points, codebook_size, seed, level, group)
        for step in range(iterations):
            draw_seed = int(random_words(seed, torch.tensor(level << 32 | step)))
            codebooks[level] = _lloyd_step(points, codebooks[level], draw_seed, group)
        if isinstance(batches, Tensor) and level + 1 < num_levels:
            # Who holds all points can hold what is left of them too.
            points = partial(_residuals, stream, codebooks[done : level + 1], first_row, num_rows)
            stream = partial(torch.cat([rows for rows, _ in points()]).split, MAX_ROWS)
            done = level + 1
    return codebooks


def _survey(
    stream: Stream, codebook_size: int, group: "distributed.ProcessGroup | None"
) -> tuple[list[int], int, torch.device]:
    """The points of each process, their width and device; refuses what cannot be clustered."""
    num_rows, width, device = 0, 0, torch.device("cpu")
    finite = torch.ones((), dtype=torch.bool)
    for batch in stream():
        width = width or batch.shape[-1]
        if batch.shape != (len(batch), width) or width < 1 or not batch.is_floating_point():
            raise ValueError(
                f"a batch is {batch.dtype} of shape {tuple(batch.shape)}, "
                f"wanted floats of shape (N, {width or 'D'})"
            )
        num_rows, device = num_rows + len(batch), batch.device
        finite = finite.to(device) & batch.float().isfinite().all()
    found = torch.tensor([num_rows, width, int(finite)], device=device)
    of_processes = [found]
    if group is not None:
        of_processes = [torch.empty_like(found) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(of_processes, found, group=group)
    # From here on every process decides alike: one that went on alone would wait for ever.
    counts, widths, all_finite = torch.stack(of_processes, 1).tolist()
    if not all(all_finite):
        raise ValueError("batches hold values that are not finite (nan or inf)")
    if sum(counts) < codebook_size or min(counts) == 0:
        where = f" in all, {counts} in the processes" if group else ""
        raise ValueError(
            f"points are {sum(counts)}{where}, k-means of {codebook_size} clusters wants at least "
            f"{codebook_size}, and one in each process"
        )
    if len(set(widths)) > 1:
        raise ValueError(f"batches have widths {widths} in the processes, wanted one")
    return counts, width, device


def _residuals(
    stream: Stream, codebooks: Tensor, first_row: int, num_rows: int
) -> Iterator[tuple[Tensor, int]]:
    """Batches of what the codebooks leave over, float32, each with the number of its first row."""
    row = first_row
    for batch in stream():
        rows = batch.float()
        if len(codebooks):
            rows = rows - rvq_encode(rows, codebooks, mode="fast")[1]
        if len(rows):
            yield rows, row
        row += len(rows)
    if row - first_row != num_rows:
        raise ValueError(
            f"batches held {num_rows} points and now hold {row - first_row}: wanted the same "
            "on each call, as from a function that starts anew"
        )


def _sample(
    points: Callable[[], Iterator[tuple[Tensor, int]]],
    size: int,
    seed: int,
    level: int,
    group: "distributed.ProcessGroup | None",
) -> Tensor:
    """[size, D]: points drawn uniformly without repetition, those of the least random keys."""
    keys, sample = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for rows, first_row in points():
        numbers = first_row + torch.arange(len(rows), device=rows.device)
        some = random_words(seed, level << 32 | numbers) >> 1 << 32 | numbers
        if len(keys):
            some, rows = torch.cat([keys, some]), torch.cat([sample, rows])
        least = some.topk(min(size, len(some)), largest=False).indices
        keys, sample = some[least], rows[least]
    if group is not None:
        missing = size - len(keys)
        keys = torch.cat([keys, keys.new_full((missing,), LAST)])
        sample = torch.cat([sample, sample.new_zeros(missing, sample.shape[1])])
        num_processes = distributed.get_world_size(group)
        all_keys = [torch.empty_like(keys) for _ in range(num_processes)]
        all_rows = [torch.empty_like(sample) for _ in range(num_processes)]
        distributed.all_gather(all_keys, keys, group=group)
        distributed.all_gather(all_rows, sample, group=group)
        least = torch.cat(all_keys).topk(size, largest=False).indices
        sample = torch.cat(all_rows)[least]
    return sample


def _lloyd_step(
    points: Callable[[], Iterator[tuple[Tensor, int]]],
    centroids: Tensor,
    seed: int,
    group: "distributed.ProcessGroup | None",
) -> Tensor:
    """The means of the points nearest to each centroid; of those without any, drawn points."""
    book = centroids[None]
    counts = torch.zeros_like(centroids[:, 0], dtype=torch.float64)
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    draws = torch.full_like(counts, LAST, dtype=torch.int64)
    drawn = torch.zeros_like(centroids)  # the points that won the draws
    for rows, first_row in points():
        codes, _ = rvq_encode(rows, book, mode="fast")
        some_counts, some_sums, some_draws = (
            of_level[0]
            for of_level in rvq_statistics(rows, codes, book, seed=seed, first_row=first_row)
        )
        counts += some_counts
        sums += some_sums
        winners = ((some_draws & ROW) - first_row).clamp(0, len(rows) - 1)
        drawn = torch.where((some_draws < draws)[:, None], rows[winners], drawn)
        draws = torch.minimum(draws, some_draws)
    if group is not None:
        own = draws.clone()
        distributed.all_reduce(draws, op=distributed.ReduceOp.MIN, group=group)
        drawn[own != draws] = 0
        for total in (counts, sums, drawn):
            distributed.all_reduce(total, group=group)
    empty = counts == 0
    drawn = drawn[draws != LAST]
    turns = (empty.cumsum(0) - 1) % len(drawn)
    means = (sums / counts[:, None]).to(centroids)
    return torch.where(empty[:, None], drawn[turns], means)
