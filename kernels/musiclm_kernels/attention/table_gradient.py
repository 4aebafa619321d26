"""The gradient of the bias table: a sum over pairs that read the same entry, without atomic floats.

Codes on a grid of `grid_rows` rows (a line is a grid of one row) put tokens into slots, time-major;
which of the batch's tokens stands in a slot, if any, differs from row to row. A block of slots is
some whole columns, so all pairs of blocks that lie equally far apart read the same tile of the bias.
A program owns one such distance: it holds that tile of the bias, walks over the batch and along the
block diagonal, recomputes the gradient of the scores there and adds it up in registers. What is left
is small: a tile for each distance, whose diagonals are added up in a fixed order.

Tokens that stand in no slot (codes outside the grid, a second token with the same code) are
strays: pairs with one of them are left to `stray_gradient`.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.attention.launch import Problem
from musiclm_kernels.attention.stray_gradient import find_strays, stray_gradient, stray_units
from musiclm_kernels.attention.tile import LOG2_E, keeps

SCANNED = 64  # slots, and tokens, that are compared together
DIFFERENCES = 64  # code differences, or table entries, of a program that adds up
SPAN = 4  # slots for each token, at most; tokens beyond count as being outside the grid
PROGRAMS = 1024  # to share the work of all distances among: some waves of any GPU


def table_gradient(
    problem: Problem,
    grad_out: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    words: Tensor,
    rows: int,
    grid_rows: int,
) -> Tensor:
    """[H, T] float32, the launcher.

    Args:
        grad_out: [B, H, N, D].
        log_sums, deltas: [B, H, rows] as the backward pass prepares them.
        words: [B or 1, rows] words of the queries' codes.
    """
    B, H, N, M, T = problem.B, problem.H, problem.N, problem.M, problem.T
    q, k, v, table, q_codes, k_codes, key_mask, seed = problem.tensors
    assert q is not None and q_codes is not None and k_codes is not None
    block = 32 if q.dtype == torch.float32 or problem.arch < 90 else 64
    R = grid_rows if grid_rows <= block else 1
    S = 2 * R - 1
    columns = block // R  # of a block
    width = max(triton.cdiv((T + 1) // 2, S), triton.cdiv(max(N, M), R))
    width = min(width, SPAN * triton.cdiv(max(N, M), R))
    num_blocks = triton.cdiv(width, columns)
    reach = num_blocks * columns * S  # differences of codes lie within +-(reach - 1)
    # An offset beyond reads the same end of the table for all of them, and could overflow.
    problem = replace(problem, offset=max(-reach, min(problem.offset, T - 1 + reach)))
    slots = num_blocks * columns * R
    # Longer walks where there is more to do than programs; each walk leaves one tile behind.
    walk = triton.cdiv(B * num_blocks * num_blocks * H, PROGRAMS)
    walks = triton.cdiv(B * num_blocks, walk)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    def fill_slots(codes: Tensor) -> tuple[Tensor, Tensor]:
        token_of = empty(len(codes), slots, dtype=torch.int32)
        grid = (triton.cdiv(slots, SCANNED) * len(codes),)
        _fill_slots[grid](codes, token_of, codes.shape[1], slots, R, SCANNED)
        return token_of, find_strays(codes, token_of, R)

    q_slots = fill_slots(q_codes)
    k_slots = q_slots if k_codes is q_codes else fill_slots(k_codes)
    tiles = empty(H, 2 * num_blocks - 1, walks, block, block)
    constants = problem.constants
    shared = {name: constants[name] for name in ("GROUP", "D", "BLOCK_D", "CAUSAL", "PRECISION")}
    _walk_diagonals[(walks, 2 * num_blocks - 1, H)](
        q, k, v, table, key_mask, seed, grad_out, log_sums, deltas, q_slots[0], k_slots[0],
        tiles, B, *grad_out.stride()[:3], rows, *problem.sizes, *problem.strides, slots, num_blocks, walk, walks,
        0 if len(q_codes) == 1 else 1, 0 if len(k_codes) == 1 else 1, R, block, **shared,
        num_warps=4 if problem.D <= 64 else 8,
        num_stages=2 if seed is not None or q.dtype == torch.float32 else 3,
    )  # fmt: skip

    sums = empty(H, 2 * reach - 1)
    _add_diagonals[(triton.cdiv(2 * reach - 1, DIFFERENCES), H)](
        tiles, sums, B, reach, num_blocks, walk, walks, R, block, DIFFERENCES, num_warps=8
    )

    strays, peaks = stray_gradient(
        problem, grad_out, log_sums, deltas, words, rows, q_slots, k_slots, R, block
    )
    grad_table = empty(H, T)
    _collect[(triton.cdiv(T, DIFFERENCES) + 2, H)](
        sums,
        strays,
        peaks,
        grad_table,
        problem.sizes[0],
        T,
        reach,
        len(peaks),
        B,
        N,
        M,
        DIFFERENCES,
    )
    return grad_table


@triton.jit(do_not_specialize=["count", "slots"])
def _fill_slots(
    code_ptr,  # [rows, count]
    token_ptr,  # [rows, slots]
    count,
    slots,
    R: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """The first token with each slot's code, or -1."""
    num_blocks = tl.cdiv(slots, SCANNED)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    slot = tl.program_id(0) % num_blocks * SCANNED + tl.arange(0, SCANNED)
    code = slot // R * (2 * R - 1) + slot % R
    token = tl.arange(0, SCANNED)
    found = tl.full([SCANNED], count, tl.int32)
    for start in tl.range(0, count, SCANNED):
        inside = start + token < count
        other = tl.load(code_ptr + row * count + start + token, mask=inside, other=-1)
        match = tl.where(other[None, :] == code[:, None], (start + token)[None, :], count)
        found = tl.minimum(found, tl.min(match, 1))
    tl.store(token_ptr + row * slots + slot, tl.where(found < count, found, -1), mask=slot < slots)


@triton.jit(
    do_not_specialize=[
        "B", "offset", "H", "N", "M", "T", "rate_31", "slots", "num_blocks", "walk", "walks",
    ]
)  # fmt: skip
def _walk_diagonals(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hkv, M, D]
    v_ptr,  # [B, Hkv, M, D]
    table_ptr,  # [H, T]
    key_mask_ptr,  # [B, M] or None
    seed_ptr,  # [] or None
    grad_out_ptr,  # [B, H, N, D]
    log_sum_ptr,  # [B, H, rows], packed
    delta_ptr,  # [B, H, rows], packed
    q_token_ptr,  # [B or 1, slots]
    k_token_ptr,  # [B or 1, slots]
    tile_ptr,  # [H, 2 * num_blocks - 1, walks, BLOCK, BLOCK]
    B,
    stride_wb,
    stride_wh,
    stride_wn,
    rows,
    offset,
    H,
    N,
    M,
    T,
    scale,
    rate_31,
    keep_scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_q_code,
    stride_k_code,
    slots,
    num_blocks,
    walk,
    walks,
    Q_BATCHED: tl.constexpr,
    K_BATCHED: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of scores, added up over one part of a block diagonal and of the batch."""
    COLUMNS: tl.constexpr = BLOCK // R
    S: tl.constexpr = 2 * R - 1
    distance = tl.program_id(1) - (num_blocks - 1)  # blocks of columns, query minus key
    h = tl.program_id(2).to(tl.int64)
    kv = h // GROUP
    place = tl.arange(0, BLOCK)
    code = place // R * S + place % R
    used = place < COLUMNS * R
    index = code[:, None] - code[None, :] + (distance * COLUMNS * S + offset)
    index = tl.minimum(tl.maximum(index, 0), T - 1)
    bias = tl.load(table_ptr + h * T + index) * LOG2_E
    d = tl.arange(0, BLOCK_D)
    inside_d = (d < D)[None, :]

    length = num_blocks - tl.abs(distance)
    first = tl.program_id(0) * walk
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in tl.range(first, tl.minimum(first + walk, B * length)):
        b = (step // length).to(tl.int64)
        block_q = step % length + tl.maximum(distance, 0)
        q_slot = b * slots * Q_BATCHED + block_q * (COLUMNS * R) + place
        k_slot = b * slots * K_BATCHED + (block_q - distance) * (COLUMNS * R) + place
        row = tl.load(q_token_ptr + q_slot, mask=used, other=-1)
        column = tl.load(k_token_ptr + k_slot, mask=used, other=-1)
        there_q, there_k = row >= 0, column >= 0
        batch_head = b * H + h
        at_q = (b * stride_qb + h * stride_qh + row.to(tl.int64) * stride_qn)[:, None] + d[None, :]
        at_k = (b * stride_kb + kv * stride_kh + column.to(tl.int64) * stride_kn)[:, None] + d[
            None, :
        ]
        at_v = (b * stride_vb + kv * stride_vh + column.to(tl.int64) * stride_vn)[:, None] + d[
            None, :
        ]
        at_w = (b * stride_wb + h * stride_wh + row.to(tl.int64) * stride_wn)[:, None] + d[None, :]
        q = tl.load(q_ptr + at_q, mask=there_q[:, None] & inside_d, other=0.0)
        k = tl.load(k_ptr + at_k, mask=there_k[:, None] & inside_d, other=0.0)
        v = tl.load(v_ptr + at_v, mask=there_k[:, None] & inside_d, other=0.0)
        grad_out = tl.load(grad_out_ptr + at_w, mask=there_q[:, None] & inside_d, other=0.0)
        at_row = batch_head * rows + row
        log_sum = tl.load(log_sum_ptr + at_row, mask=there_q, other=float("inf"))
        delta = tl.load(delta_ptr + at_row, mask=there_q, other=0.0)
        visible = there_k
        if key_mask_ptr is not None:
            visible = tl.load(key_mask_ptr + b * M + column, mask=there_k, other=0) != 0
        visible = tl.broadcast_to(visible[None, :], [BLOCK, BLOCK])
        if CAUSAL:
            visible = visible & (column[None, :] <= row[:, None] + (M - N))
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E) + bias
        weights = tl.exp2(tl.where(visible, scores, float("-inf")) - log_sum[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        if seed_ptr is not None:
            kept = keeps(seed_ptr, rate_31, row[:, None], column[None, :], batch_head)
            grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
        total += weights * (grad_weights - delta[:, None])
    # A walk past the end of a short diagonal leaves nothing, and is not read.
    if first < B * length:
        tile = (h * (2 * num_blocks - 1) + tl.program_id(1)) * walks + tl.program_id(0)
        local = place[:, None] * BLOCK + place[None, :]
        tl.store(tile_ptr + tile * BLOCK * BLOCK + local, total)


@triton.jit(do_not_specialize=["B", "reach", "num_blocks", "walk", "walks"])
def _add_diagonals(
    tile_ptr,  # [H, 2 * num_blocks - 1, walks, BLOCK, BLOCK]
    sum_ptr,  # [H, 2 * reach - 1]
    B,
    reach,
    num_blocks,
    walk,
    walks,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    DIFFERENCES: tl.constexpr,
):
    """For each difference of codes, the sum of the tiles' entries that have it."""
    COLUMNS: tl.constexpr = BLOCK // R
    S: tl.constexpr = 2 * R - 1
    h = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * DIFFERENCES + tl.arange(0, DIFFERENCES)
    # reach is a multiple of S, so the shift to positive numbers keeps the remainder
    shifted = (number + 1 + (R - 1))[None, :]  # difference + reach + R - 1
    down = shifted % S - (R - 1)  # rows, query minus key
    across = shifted // S - reach // S  # columns
    place = tl.arange(0, BLOCK)[:, None]
    x, y = place // R, place % R
    # the one distance of blocks at which a key `across` columns back lies in a block
    distance = (across - x + (COLUMNS - 1) + reach) // COLUMNS - reach // COLUMNS
    x_key = x + distance * COLUMNS - across
    y_key = y - down
    exists = (place < COLUMNS * R) & (number < 2 * reach - 1)[None, :]
    exists &= (y_key >= 0) & (y_key < R) & (tl.abs(distance) < num_blocks)
    walked = tl.where(exists, tl.cdiv(B * (num_blocks - tl.abs(distance)), walk), 0)
    tile = (h * (2 * num_blocks - 1) + distance + num_blocks - 1) * walks
    at = tile_ptr + tile * BLOCK * BLOCK + place * BLOCK + x_key * R + y_key
    total = tl.zeros([BLOCK, DIFFERENCES], tl.float32)
    for w in tl.range(0, walks):
        total += tl.load(at, mask=w < walked, other=0.0)
        at += BLOCK * BLOCK
    inside = number < 2 * reach - 1
    tl.store(sum_ptr + h * (2 * reach - 1) + number, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["offset", "T", "reach", "num_peaks", "B", "N", "M"])
def _collect(
    sum_ptr,  # [H, 2 * reach - 1]
    stray_ptr,  # [H, T] int64
    peak_ptr,  # [num_peaks]
    grad_ptr,  # [H, T]
    offset,
    T,
    reach,
    num_peaks,
    B,
    N,
    M,
    DIFFERENCES: tl.constexpr,
):
    """From differences of codes to entries of the table, of which the first and the last also take
    all that lies beyond; those two have a program each."""
    h = tl.program_id(1).to(tl.int64)
    sums = sum_ptr + h * (2 * reach - 1) + (reach - 1)  # at difference 0
    units = stray_units(peak_ptr, num_peaks, B, N, M)
    block = tl.program_id(0) - 2
    step = tl.arange(0, DIFFERENCES)
    if block >= 0:
        entry = block * DIFFERENCES + step
        difference = entry - offset
        inner = (entry > 0) & (entry < T - 1)
        total = tl.load(sums + difference, mask=inner & (tl.abs(difference) < reach), other=0.0)
        strays = tl.load(stray_ptr + h * T + entry, mask=inner, other=0)
        tl.store(grad_ptr + h * T + entry, total + strays.to(tl.float32) / units, mask=inner)
    else:
        last = block == -1
        # With one entry, the first takes everything.
        begin = tl.where(last, T - 1 - offset, 1 - reach)
        end = tl.where(last | (T == 1), reach, 1 - offset)
        begin, end = tl.maximum(begin, 1 - reach), tl.minimum(end, reach)
        beyond = tl.zeros([DIFFERENCES], tl.float32)
        for start in tl.range(begin, end, DIFFERENCES):
            beyond += tl.load(sums + start + step, mask=start + step < end, other=0.0)
        at = h * T + tl.where(last, T - 1, 0)
        if (T > 1) | (block == -2):
            stray = tl.load(stray_ptr + at).to(tl.float32) / units
            tl.store(grad_ptr + at, tl.sum(beyond) + stray)
