"""The other steps of the training of residual codebooks in Triton: dead codes, and the averages.

Replacements: a program numbers the drawn rows and the dead codes of one level; another one takes the
residuals of the rows that a block of codes becomes. Averages: a program covers a block of codes of a
level, after one has added up the level's sizes. Nothing waits for the device.

Dimensions: N rows, Q levels (q of them have codes), K codes a level, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.quantize.ema_statistics import (
    NOBODY,
    ROW,
    rvq_statistics,
    tile,
    with_rows_packed,
)

CHUNK = 1024  # codes of a level that are numbered, or added up, together


@triton.jit
def _moved(average, batch, decay, share):
    # fma by name: both kernels that ask whether a code is dead then round alike.
    return tl.fma(average, decay, batch * share)


@triton.jit(do_not_specialize=["K"])
def _turns_kernel(
    size_ptr,  # [Q, K]
    count_ptr,  # [Q, K]
    draw_ptr,  # [Q, K] int64
    winner_ptr,  # [Q, K] int64: the rows that won a draw, in the order of the draws
    turn_ptr,  # [Q, K] int32: which of them a code becomes, -1 if it is not dead
    K,
    decay,
    share,
    dead_threshold,
    CHUNK: tl.constexpr,
):
    """A program numbers the drawn rows of a level, then its dead codes."""
    first = tl.program_id(0).to(tl.int64) * K
    num_winners = 0
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        draw = tl.load(draw_ptr + first + k, mask=k < K, other=NOBODY)
        drawn = draw != NOBODY
        place = num_winners + tl.cumsum(drawn.to(tl.int32), 0) - 1
        tl.store(winner_ptr + first + place, draw & ROW, mask=drawn)
        num_winners += tl.sum(drawn.to(tl.int32))
    num_dead = 0
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = k < K
        size = tl.load(size_ptr + first + k, mask=inside, other=0.0)
        count = tl.load(count_ptr + first + k, mask=inside, other=0.0)
        dead = inside & (_moved(size, count, decay, share) < dead_threshold) & (num_winners > 0)
        place = num_dead + tl.cumsum(dead.to(tl.int32), 0) - 1
        turn = tl.maximum(place, 0) % tl.maximum(num_winners, 1)
        tl.store(turn_ptr + first + k, tl.where(dead, turn, -1), mask=inside)
        num_dead += tl.sum(dead.to(tl.int32))


@triton.jit(do_not_specialize=["N", "q", "K", "first_row"])
def _replacements_kernel(
    x_ptr,  # [N, D], strided
    code_ptr,  # [N, q], strided
    codebook_ptr,  # [Q, K, D]
    winner_ptr,  # [Q, K] int64
    turn_ptr,  # [Q, K] int32
    replacement_ptr,  # [Q, K, D]
    N,
    q,
    K,
    first_row,
    stride_x,
    stride_code,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    level = tl.program_id(1)
    first = level.to(tl.int64) * K
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside_d = (d < D)[None, :]
    turn = tl.load(turn_ptr + first + k, mask=k < K, other=-1)
    residual = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if tl.max(turn) >= 0:
        row = tl.load(winner_ptr + first + turn, mask=turn >= 0, other=-1) - first_row
        here = (turn >= 0) & (row >= 0) & (row < N)
        at = row[:, None] * stride_x + d[None, :]
        residual = tl.load(x_ptr + at, mask=here[:, None] & inside_d, other=0.0).to(tl.float32)
        for earlier in range(tl.minimum(level, q)):
            code = tl.load(code_ptr + row * stride_code + earlier, mask=here, other=-1).to(tl.int64)
            at = (tl.cast(earlier, tl.int64) * K + code)[:, None] * D + d[None, :]
            has_code = (code >= 0) & (code < K)
            residual -= tl.load(codebook_ptr + at, mask=has_code[:, None] & inside_d, other=0.0)
    at = (first + k)[:, None] * D + d[None, :]
    tl.store(replacement_ptr + at, residual, mask=(k < K)[:, None] & inside_d)


@triton.jit(do_not_specialize=["K"])
def _totals_kernel(
    size_ptr,  # [Q, K]
    count_ptr,  # [Q, K]
    total_ptr,  # [Q, 2]
    K,
    decay,
    share,
    CHUNK: tl.constexpr,
):
    """Of a level: the sum of its sizes after this step, and of the batch's counts."""
    level = tl.program_id(0).to(tl.int64)
    sizes = tl.zeros([CHUNK], tl.float32)
    counts = tl.zeros([CHUNK], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        size = tl.load(size_ptr + level * K + k, mask=k < K, other=0.0)
        count = tl.load(count_ptr + level * K + k, mask=k < K, other=0.0)
        sizes += _moved(size, count, decay, share)
        counts += count
    tl.store(total_ptr + level * 2, tl.sum(sizes))
    tl.store(total_ptr + level * 2 + 1, tl.sum(counts))


@triton.jit(do_not_specialize=["K"])
def _apply_kernel(
    codebook_ptr,  # [Q, K, D]
    size_ptr,  # [Q, K]
    total_ptr,  # [Q, K, D]
    count_ptr,  # [Q, K]
    sum_ptr,  # [Q, K, D]
    replacement_ptr,  # [Q, K, D]
    level_ptr,  # [Q, 2]
    K,
    decay,
    share,
    dead_threshold,
    eps,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    level = tl.program_id(1).to(tl.int64)
    num_seen = tl.load(level_ptr + level * 2)
    if tl.load(level_ptr + level * 2 + 1) > 0:  # a level that no vector reached stays as it is
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        d = tl.arange(0, BLOCK_D)
        inside = k < K
        entry = level * K + k
        size = tl.load(size_ptr + entry, mask=inside, other=0.0)
        size = _moved(size, tl.load(count_ptr + entry, mask=inside, other=0.0), decay, share)
        smoothed = (size + eps) / (num_seen + K * eps) * num_seen
        dead = size < dead_threshold
        fair = tl.maximum(num_seen / K, dead_threshold)
        tl.store(size_ptr + entry, tl.where(dead, fair, size), mask=inside)

        at = entry[:, None] * D + d[None, :]
        mask = inside[:, None] & (d < D)[None, :]
        total = tl.load(total_ptr + at, mask=mask, other=0.0)
        total = _moved(total, tl.load(sum_ptr + at, mask=mask, other=0.0), decay, share)
        fresh = tl.load(replacement_ptr + at, mask=mask & dead[:, None], other=0.0)
        book = tl.where(dead[:, None], fresh, total / smoothed[:, None])
        tl.store(codebook_ptr + at, book, mask=mask)
        tl.store(total_ptr + at, tl.where(dead[:, None], fresh * fair, total), mask=mask)


def rvq_replacements(
    codebooks: Tensor,
    x: Tensor,
    codes: Tensor,
    cluster_size: Tensor,
    counts: Tensor,
    draws: Tensor,
    decay: float,
    dead_threshold: float,
    first_row: int,
) -> Tensor:
    """The op's body on CUDA: see ema.py."""
    (N, D), (Q, K, _), q = x.shape, codebooks.shape, codes.shape[1]
    x, codes, codebooks = with_rows_packed(x), with_rows_packed(codes), codebooks.contiguous()
    winners = torch.empty(Q, K, dtype=torch.int64, device=x.device)
    turns = torch.empty(Q, K, dtype=torch.int32, device=x.device)
    _turns_kernel[(Q,)](
        cluster_size.contiguous(), counts.contiguous(), draws.contiguous(), winners, turns,
        K, decay, 1 - decay, dead_threshold, CHUNK=CHUNK,
    )  # fmt: skip
    replacements = codebooks.new_empty(Q, K, D)
    BLOCK_K, BLOCK_D = tile(D, K)
    _replacements_kernel[(triton.cdiv(K, BLOCK_K), Q)](
        x, codes, codebooks, winners, turns, replacements,
        N, q, K, first_row, x.stride(0), codes.stride(0),
        D=D, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, num_stages=1,
    )  # fmt: skip
    return replacements


def rvq_apply_statistics(
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    replacements: Tensor,
    decay: float,
    dead_threshold: float,
    eps: float,
) -> None:
    """The op's body on CUDA: see ema.py."""
    Q, K, D = codebooks.shape
    written = (codebooks, cluster_size, cluster_sum)
    book, size, total = (x.contiguous() for x in written)
    counts = counts.contiguous()
    levels = codebooks.new_empty(Q, 2)
    _totals_kernel[(Q,)](size, counts, levels, K, decay, 1 - decay, CHUNK=CHUNK)
    BLOCK_K, BLOCK_D = tile(D, K)
    _apply_kernel[(triton.cdiv(K, BLOCK_K), Q)](
        book, size, total, counts, sums.contiguous(), replacements.contiguous(), levels,
        K, decay, 1 - decay, dead_threshold, eps, D=D, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    for ours, packed in zip(written, (book, size, total), strict=True):
        if packed is not ours:
            ours.copy_(packed)


def rvq_ema_update(
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    x: Tensor,
    codes: Tensor,
    seed: Tensor,
    decay: float,
    dead_threshold: float,
    eps: float,
) -> None:
    """The op's body on CUDA: the three steps one after another."""
    counts, sums, draws = rvq_statistics(codebooks, x, codes, seed, 0)
    replacements = rvq_replacements(
        codebooks, x, codes, cluster_size, counts, draws, decay, dead_threshold, 0
    )
    rvq_apply_statistics(
        codebooks, cluster_size, cluster_sum, counts, sums, replacements,
        decay, dead_threshold, eps,
    )  # fmt: skip
