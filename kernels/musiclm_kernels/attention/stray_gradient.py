"""The part of the bias table's gradient that comes from strays: tokens that stand in no slot.

`table_gradient` walks over slots. A code outside the grid has none, and of two tokens with the same
code the second has none: pairs with such a token are recomputed here, and their gradients added to
the table as 64-bit integers, of which the order does not matter. Where there are no strays, both
passes end at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.attention.launch import Problem
from musiclm_kernels.attention.tile import (
    LOG2_E,
    SCAN,
    keeps,
    key_words,
    load_rows,
    sees,
    table_bias,
)

FOUND = 1024  # tokens that are looked at together for strays


def find_strays(codes: Tensor, token_of: Tensor, grid_rows: int) -> Tensor:
    """int32 [len(codes), 2]: each row's first and last stray; its count and -1 without any.

    Args:
        codes: [B or 1, count].
        token_of: [B or 1, slots], the token in each slot or -1.
    """
    strays = torch.empty((len(codes), 2), dtype=torch.int32, device=codes.device)
    sizes = codes.shape[1], token_of.shape[1]
    _find_strays[(len(codes),)](codes, token_of, strays, *sizes, grid_rows, FOUND)
    return strays


def stray_gradient(
    problem: Problem,
    grad_out: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    words: Tensor,
    rows: int,
    q_slots: tuple[Tensor, Tensor],
    k_slots: tuple[Tensor, Tensor],
    grid_rows: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """int64 [H, T], the sums over pairs with a stray, and the peaks from which `stray_units` tells
    the size of their unit.

    Args:
        grad_out: [B, H, N, D].
        log_sums, deltas: [B, H, rows] as the backward pass prepares them.
        words: [B or 1, rows] words of the queries' codes.
        q_slots, k_slots: the token in each slot, [B or 1, slots], and what `find_strays` found.
        block: slots that `table_gradient` takes together.
    """
    B, H, N, M, T = problem.B, problem.H, problem.N, problem.M, problem.T
    q, k, v, table, q_codes, k_codes, key_mask, seed = problem.tensors
    assert q is not None and q_codes is not None and k_codes is not None
    (q_token, q_strays), (k_token, k_strays) = q_slots, k_slots
    constants = problem.constants
    shared = {name: constants[name] for name in ("GROUP", "D", "BLOCK_D", "CAUSAL", "PRECISION")}
    wide = problem.D > 64
    stray_q = 16 if wide and block == 32 else block
    stray_k = 16 if wide else block // 2
    blocks_q, blocks_k = triton.cdiv(N, stray_q), triton.cdiv(M, stray_k)
    peaks = torch.empty(B * H * blocks_q, dtype=torch.float32, device=q.device)
    strays = torch.zeros(H, T, dtype=torch.int64, device=q.device)
    for adding in (False, True):
        _add_strays[(B * H * blocks_q,)](
            q, k, v, table, q_codes, k_codes, key_mask, seed, grad_out, log_sums, deltas,
            words, q_token, k_token, q_strays, k_strays, peaks, strays,
            B, *grad_out.stride()[:3], rows, *problem.sizes, *problem.strides, q_token.shape[1], blocks_q, blocks_k,
            0 if len(q_codes) == 1 else 1, 0 if len(k_codes) == 1 else 1, grid_rows, stray_q, stray_k, adding,
            **shared, num_warps=8, num_stages=1,
        )  # fmt: skip
    return strays, peaks


@triton.jit
def _is_stray(code, place, token_ptr, slots, R: tl.constexpr):
    """Whether the token at each place stands in no slot."""
    S: tl.constexpr = 2 * R - 1
    slot = code // S * R + code % S
    inside = (code >= 0) & (code % S < R) & (slot < slots)
    return tl.load(token_ptr + slot, mask=inside, other=-1) != place


@triton.jit(do_not_specialize=["count", "slots"])
def _find_strays(
    code_ptr,  # [rows, count]
    token_ptr,  # [rows, slots]
    stray_ptr,  # [rows, 2]
    count,
    slots,
    R: tl.constexpr,
    FOUND: tl.constexpr,
):
    """The first and the last token that stands in no slot: [count, -1] if there is none."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.full([FOUND], count, tl.int32)
    last = tl.full([FOUND], -1, tl.int32)
    for start in tl.range(0, count, FOUND):
        place = start + tl.arange(0, FOUND)
        code = tl.load(code_ptr + row * count + place, mask=place < count, other=0)
        stray = _is_stray(code, place, token_ptr + row * slots, slots, R) & (place < count)
        first = tl.minimum(first, tl.where(stray, place, count))
        last = tl.maximum(last, tl.where(stray, place, -1))
    tl.store(stray_ptr + row * 2, tl.min(first))
    tl.store(stray_ptr + row * 2 + 1, tl.max(last))


@triton.jit(
    do_not_specialize=[
        "B", "offset", "H", "N", "M", "T", "rate_31", "slots", "blocks_q", "blocks_k",
    ]
)  # fmt: skip
def _add_strays(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hkv, M, D]
    v_ptr,  # [B, Hkv, M, D]
    table_ptr,  # [H, T]
    q_code_ptr,  # [B or 1, N]
    k_code_ptr,  # [B or 1, M]
    key_mask_ptr,  # [B, M] or None
    seed_ptr,  # [] or None
    grad_out_ptr,  # [B, H, N, D]
    log_sum_ptr,  # [B, H, rows], packed
    delta_ptr,  # [B, H, rows], packed
    q_word_ptr,  # [B or 1, rows]
    q_token_ptr,  # [B or 1, slots]
    k_token_ptr,  # [B or 1, slots]
    q_stray_ptr,  # [B or 1, 2]
    k_stray_ptr,  # [B or 1, 2]
    peak_ptr,  # [programs]
    stray_ptr,  # [H, T] int64
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
    blocks_q,
    blocks_k,
    Q_BATCHED: tl.constexpr,
    K_BATCHED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADDING: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pairs with a token that stands in no slot. First the largest gradient among them, which
    fixes the size of the integers' unit; then, ADDING, their sums."""
    program = tl.program_id(0)
    batch_head = (program // blocks_q).to(tl.int64)
    b = batch_head // H
    h = batch_head % H
    start = program % blocks_q * BLOCK_Q
    first_k = tl.load(k_stray_ptr + b * K_BATCHED * 2)
    last_k = tl.load(k_stray_ptr + b * K_BATCHED * 2 + 1)
    # All keys, if one of these queries may be a stray; else those around the keys that are.
    all_keys = tl.load(q_stray_ptr + b * Q_BATCHED * 2) < start + BLOCK_Q
    all_keys &= tl.load(q_stray_ptr + b * Q_BATCHED * 2 + 1) >= start
    begin = tl.where(all_keys, 0, first_k // BLOCK_K)
    end = tl.where(all_keys, blocks_k, last_k // BLOCK_K + 1)
    peak = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    if all_keys | (last_k >= 0):
        row = start + tl.arange(0, BLOCK_Q)
        q_ptr += b * stride_qb + h * stride_qh + tl.cast(start, tl.int64) * stride_qn
        q = load_rows(q_ptr, stride_qn, N - start, D, BLOCK_Q, BLOCK_D, True)
        grad_out_ptr += b * stride_wb + h * stride_wh + tl.cast(start, tl.int64) * stride_wn
        grad_out = load_rows(grad_out_ptr, stride_wn, N - start, D, BLOCK_Q, BLOCK_D, True)
        log_sum = tl.load(log_sum_ptr + batch_head * rows + row)
        delta = tl.load(delta_ptr + batch_head * rows + row)
        word_q = tl.load(q_word_ptr + b * Q_BATCHED * rows + row)
        code = tl.load(q_code_ptr + b * stride_q_code + tl.minimum(row, N - 1))
        stray_q = _is_stray(code, row, q_token_ptr + b * Q_BATCHED * slots, slots, R)
        k_ptr += b * stride_kb + h // GROUP * stride_kh
        v_ptr += b * stride_vb + h // GROUP * stride_vh
        if key_mask_ptr is not None:
            key_mask_ptr += b * M
        unit = 0.0
        if ADDING:
            unit = stray_units(peak_ptr, tl.num_programs(0), B, N, M)
        for block in tl.range(begin, end):
            start_k = block * BLOCK_K
            column = start_k + tl.arange(0, BLOCK_K)
            k_code = tl.load(k_code_ptr + b * stride_k_code + tl.minimum(column, M - 1))
            stray_k = _is_stray(k_code, column, k_token_ptr + b * K_BATCHED * slots, slots, R)
            stray = stray_q[:, None] | stray_k[None, :]
            stray &= (row < N)[:, None] & (column < M)[None, :]
            if tl.max(stray.to(tl.int32)) > 0:
                here = tl.cast(start_k, tl.int64)
                k = load_rows(
                    k_ptr + here * stride_kn, stride_kn, M - start_k, D, BLOCK_K, BLOCK_D, True
                )
                v = load_rows(
                    v_ptr + here * stride_vn, stride_vn, M - start_k, D, BLOCK_K, BLOCK_D, True
                )
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
                word = key_words(k_code)[None, :]
                scores += table_bias(table_ptr + h * T, word_q[:, None], word, T, True, False)
                visible = sees(row[:, None], column[None, :], N, M, key_mask_ptr, CAUSAL)
                weights = tl.exp2(tl.where(visible, scores, float("-inf")) - log_sum[:, None])
                grad = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
                if seed_ptr is not None:
                    kept = keeps(seed_ptr, rate_31, row[:, None], column[None, :], batch_head)
                    grad = tl.where(kept, grad * keep_scale, 0.0)
                grad = tl.where(stray, weights * (grad - delta[:, None]), 0.0)
                if ADDING:
                    # Most strays are far from everything: the ends are summed here first.
                    whole = (grad * unit).to(tl.int64)
                    index = tl.maximum(word_q[:, None], word) - word
                    index = tl.minimum(index, tl.cast(T - 1, tl.uint32)).to(tl.int32)
                    low, high = index == 0, index == T - 1
                    sums = stray_ptr + h * T
                    tl.atomic_add(sums, tl.sum(tl.where(low, whole, 0)), sem="relaxed")
                    tl.atomic_add(
                        sums + T - 1, tl.sum(tl.where(high & ~low, whole, 0)), sem="relaxed"
                    )
                    inside = stray & ~low & ~high
                    tl.atomic_add(sums + index, whole, mask=inside, sem="relaxed")
                else:
                    peak = tl.maximum(peak, tl.abs(grad))
    if not ADDING:
        tl.store(peak_ptr + program, tl.max(peak))


@triton.jit
def stray_units(peak_ptr, count, B, N, M):
    """Units of the integers in one: the power of two at which a head's pairs cannot overflow."""
    peak = tl.zeros([SCAN], tl.float32)
    for start in tl.range(0, count, SCAN):
        at = start + tl.arange(0, SCAN)
        peak = tl.maximum(peak, tl.load(peak_ptr + at, mask=at < count, other=0.0))
    pairs = tl.cast(B, tl.float32) * tl.cast(N, tl.float32) * tl.cast(M, tl.float32)
    most = tl.maximum(tl.max(peak) * pairs, 1e-18)
    return tl.exp2(60.0 - tl.ceil(tl.log2(most)))
