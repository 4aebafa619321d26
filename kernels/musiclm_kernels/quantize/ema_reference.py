"""Training of residual codebooks by moving averages, in plain PyTorch.

Dimensions: N vectors, Q levels, K codes a level, D width. A vector counts at a level if it has a
code there (not -1) and its residual there is finite.
"""

import torch
from torch import Tensor

from musiclm_kernels.ordered_sum import sum_rows_by_index
from musiclm_kernels.philox import WORD, philox_4x32
from musiclm_kernels.quantize.reference import check_range, look_up

NOBODY = 2**63 - 1  # a draw that no vector took part in; below it, key * 2^32 + row


def rvq_statistics(
    x: Tensor, codes: Tensor, codebooks: Tensor, *, seed: int | Tensor, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """How many vectors chose each code, the sums of their residuals (in float64, rounded once), and
    the vector that each of K draws chose."""
    check_range(codes, codebooks)
    K = codebooks.shape[1]
    counts, sums = codebooks.new_zeros(codebooks.shape[:2]), codebooks.new_zeros(codebooks.shape)
    draws = torch.full(codebooks.shape[:2], NOBODY, dtype=torch.int64, device=x.device)
    rows = first_row + torch.arange(len(x), device=x.device)
    residual = x.to(codebooks.dtype)
    for level in range(codes.shape[1]):
        chosen = codes[:, level].long()
        counted = (chosen >= 0) & residual.isfinite().all(1)
        bins = torch.where(counted, chosen, K)  # the bin past the last is thrown away
        counts[level] = sum_rows_by_index(torch.ones_like(residual[:, :1]), bins, K + 1)[:K, 0]
        sums[level] = sum_rows_by_index(residual.double(), bins, K + 1)[:K].to(sums.dtype)

        slots, keys = _draw(seed, level, rows, K)
        entries = torch.where(counted, keys << 32 | rows, NOBODY)
        draws[level].scatter_reduce_(0, slots, entries, "amin")
        residual = residual - look_up(codebooks[level], chosen)
    return counts, sums, draws


def rvq_replacements(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    cluster_size: Tensor,
    counts: Tensor,
    draws: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    first_row: int = 0,
) -> Tensor:
    """For each dead code the residual of a drawn vector, zero for a vector of another process."""
    check_range(codes, codebooks)
    replacements = codebooks.new_zeros(codebooks.shape)
    if len(x) == 0:
        return replacements
    dead = _moved(cluster_size, counts, decay) < dead_threshold
    drawn = draws != NOBODY
    num_drawn = drawn.sum(1, keepdim=True)
    in_order = (~drawn).to(torch.uint8).argsort(dim=1, stable=True)  # first the draws of somebody
    # The j-th dead code takes the j-th of those, again from the first after the last.
    turns = (dead.cumsum(1) - 1).clamp_min(0) % num_drawn.clamp_min(1)
    rows = (draws.gather(1, in_order.gather(1, turns)) & WORD) - first_row
    here = dead & (num_drawn > 0) & (rows >= 0) & (rows < len(x))
    residual = x.to(codebooks.dtype)
    for level in range(codes.shape[1]):
        taken = residual[rows[level].clamp(0, len(x) - 1)]
        replacements[level] = taken.masked_fill(~here[level, :, None], 0.0)
        residual = residual - look_up(codebooks[level], codes[:, level])
    return replacements


def rvq_apply_statistics(
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    replacements: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    eps: float = 1e-5,
) -> None:
    """Move the averages by one step, and the codebooks with them, in place."""
    for level in range(len(codebooks)):  # a level fits a CPU's cache, all of them do not
        _apply_to_level(
            codebooks[level], cluster_size[level], cluster_sum[level],
            counts[level], sums[level], replacements[level],
            decay, dead_threshold, eps,
        )  # fmt: skip


def rvq_ema_update(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    seed: int | Tensor,
    eps: float = 1e-5,
) -> None:
    """The three steps one after another, for a batch that one process has whole."""
    counts, sums, draws = rvq_statistics(x, codes, codebooks, seed=seed)
    replacements = rvq_replacements(
        x, codes, codebooks, cluster_size, counts, draws,
        decay=decay, dead_threshold=dead_threshold,
    )  # fmt: skip
    rvq_apply_statistics(
        codebooks, cluster_size, cluster_sum, counts, sums, replacements,
        decay=decay, dead_threshold=dead_threshold, eps=eps,
    )  # fmt: skip


def _apply_to_level(
    book: Tensor,
    size: Tensor,
    total: Tensor,
    counts: Tensor,
    sums: Tensor,
    replacements: Tensor,
    decay: float,
    dead_threshold: float,
    eps: float,
) -> None:
    K = len(size)
    new_size, new_total = _moved(size, counts, decay), _moved(total, sums, decay)
    num_seen = new_size.sum()
    smoothed = (new_size + eps) / (num_seen + K * eps) * num_seen
    new_book = new_total / smoothed[:, None]

    dead = new_size < dead_threshold
    # A fresh code starts as if it had its fair share, so it has time to find its vectors.
    fair = (num_seen / K).clamp_min(dead_threshold)
    new_size = torch.where(dead, fair, new_size)
    new_total = torch.where(dead[:, None], replacements * fair, new_total)
    new_book = torch.where(dead[:, None], replacements, new_book)

    learns = counts.sum() > 0  # a level that no vector reached stays as it is
    size.copy_(torch.where(learns, new_size, size))
    total.copy_(torch.where(learns, new_total, total))
    book.copy_(torch.where(learns, new_book, book))


def _draw(seed: int | Tensor, level: int, rows: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The draw in [0, K) that each row takes part in, and its key there, of which the least wins."""
    seeds = torch.as_tensor(seed, dtype=torch.int64, device=rows.device)
    zero = torch.zeros_like(rows)
    first, second, _, _ = philox_4x32(
        (rows, zero + level, zero, zero), (seeds & WORD, (seeds >> 32) & WORD)
    )
    return first * K >> 32, second >> 1


def _moved(average: Tensor, batch: Tensor, decay: float) -> Tensor:
    return average * decay + batch * (1 - decay)
