"""Forward attention: a program owns a block of queries of one head and walks over the keys.

Queries, running maximum, sum, output and the head's whole bias table stay in registers (the table
passes through shared memory once a tile, where its entries are picked). Softmax runs in base 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.attention.launch import Problem, forward_config
from musiclm_kernels.attention.tile import (
    LN_2,
    LOG2_E,
    all_in_table,
    code_range,
    keeps,
    key_words,
    load_rows,
    query_words,
    sees,
    table_bias,
)
from musiclm_kernels.layout import empty_rows_like

# Of exponents below the fixed maximum: exp(-60) times a small value is still a normal fp32 number.
MAX_SPREAD = tl.constexpr(60.0)


def attention_and_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    q_codes: Tensor | None,
    k_codes: Tensor | None,
    offset: int,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    dropout: float,
    dropout_seed: Tensor | None,
    score_bound: Tensor | None,
    grid_rows: int,
) -> tuple[Tensor, Tensor]:
    """The launcher: `reference.attention_and_lse` in one kernel."""
    problem = Problem.of(
        q, k, v, table, q_codes, k_codes, offset, causal, key_mask, scale, dropout, dropout_seed
    )
    out = empty_rows_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    B, H, N, M = problem.B, problem.H, problem.N, problem.M
    if q.numel() == 0 or M == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    # fp16 cannot hold weights far below one, which a fixed maximum makes.
    bounded = score_bound is not None and q.dtype != torch.float16
    config = forward_config(problem, bounded)
    grid = (triton.cdiv(N, config.block_q) * H * B,)
    _forward[grid](
        *problem.tensors,
        score_bound if bounded else None,
        out,
        lse,
        score_bound.stride(0) if score_bound is not None else 0,
        *out.stride()[:3],
        *problem.sizes,
        *problem.strides,
        **problem.constants,
        **config.options,
    )
    return out, lse


@triton.jit(do_not_specialize=["offset", "H", "N", "M", "T", "rate_31"])
def _forward(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hkv, M, D]
    v_ptr,  # [B, Hkv, M, D]
    table_ptr,  # [H, T] or None
    q_code_ptr,  # [B or 1, N]
    k_code_ptr,  # [B or 1, M]
    key_mask_ptr,  # [B, M] or None
    seed_ptr,  # [] or None
    bound_ptr,  # [H] or None
    out_ptr,  # [B, H, N, D]
    lse_ptr,  # [B, H, N], packed
    stride_bound,
    stride_ob,
    stride_oh,
    stride_on,
    offset,
    H,
    N,
    M,
    T,
    scale,
    rate_31,  # dropout, of 2^31
    keep_scale,  # 1 / (1 - dropout)
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
    GROUP: tl.constexpr,  # query heads that share a key head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,  # 0: the table stays in global memory
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_Q)
    block = tl.program_id(0) % num_blocks
    if CAUSAL:
        block = num_blocks - 1 - block  # the longest first
    batch_head = tl.program_id(0) // num_blocks
    b = (batch_head // H).to(tl.int64)
    h = (batch_head % H).to(tl.int64)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    start = block * BLOCK_Q
    row = start + tl.arange(0, BLOCK_Q)

    q_ptr += b * stride_qb + h * stride_qh + tl.cast(start, tl.int64) * stride_qn
    q = load_rows(q_ptr, stride_qn, N - start, D, BLOCK_Q, BLOCK_D, True)

    end = M
    full = M // BLOCK_K * BLOCK_K  # keys before it need no mask
    if CAUSAL:
        end = tl.maximum(tl.minimum(M, start + BLOCK_Q + M - N), 0)
        full = tl.maximum(tl.minimum(M, start + 1 + M - N), 0) // BLOCK_K * BLOCK_K
    if key_mask_ptr is not None:
        key_mask_ptr += b * M
        full = 0

    # `plain`: no index needs cutting to the table and a fixed maximum is safe. It holds for the
    # codes of one grid or line, and is found out here: every program reads all codes of its keys
    # once, which costs less than cutting each pair's index.
    plain = full > 0
    table = table_ptr
    query_word = row
    last_code = 0
    top = 0.0  # of all scores, subtracted from each; 0 where the maximum is found on the way
    if table_ptr is not None:
        query_code = tl.load(q_code_ptr + b * stride_q_code + tl.minimum(row, N - 1))
        query_word = query_words(query_code, offset, T)
        k_code_ptr += b * stride_k_code
        last_code = tl.load(k_code_ptr + M - 1)
        table += h * T
        if BLOCK_T > 0:
            table = tl.load(table + tl.minimum(tl.arange(0, BLOCK_T), T - 1)) * LOG2_E
            lowest_k, highest_k = code_range(k_code_ptr, M)
            lowest_q, highest_q = tl.min(query_code).to(tl.int64), tl.max(query_code).to(tl.int64)
            plain &= all_in_table(lowest_q, highest_q, lowest_k, highest_k, offset, T)
        else:
            plain = False
    highest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    if bound_ptr is not None:
        bound = tl.load(bound_ptr + h * stride_bound) * LOG2_E
        top = bound
        spread = 2 * bound
        if BLOCK_T > 0:
            top += tl.max(table)
            spread += tl.max(table) - tl.min(table)
        plain &= (bound >= 0) & (spread < MAX_SPREAD * LOG2_E)
        top = tl.where(plain, top, 0.0)
        highest = tl.where(plain, tl.zeros_like(highest), highest)
        if BLOCK_T > 0:
            table -= top

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    begin = 0
    if BLOCK_T > 0 or table_ptr is None:
        begin = tl.where(plain, full, 0)
        for start_k in tl.range(0, begin, BLOCK_K):
            acc, total, highest = _tile(
                acc, total, highest, start_k, q, k_ptr, v_ptr, table, query_word, k_code_ptr,
                last_code, key_mask_ptr, seed_ptr, row, batch_head, top, N, M, T, scale, rate_31,
                stride_kn, stride_vn, D, BLOCK_D, BLOCK_K, BLOCK_T > 0, CAUSAL,
                PRECISION, table_ptr is not None, True, bound_ptr is not None,
            )  # fmt: skip
    for start_k in tl.range(begin, end, BLOCK_K):
        acc, total, highest = _tile(
            acc, total, highest, start_k, q, k_ptr, v_ptr, table, query_word, k_code_ptr,
            last_code, key_mask_ptr, seed_ptr, row, batch_head, top, N, M, T, scale, rate_31,
            stride_kn, stride_vn, D, BLOCK_D, BLOCK_K, BLOCK_T > 0, CAUSAL,
            PRECISION, table_ptr is not None, False, False,
        )  # fmt: skip

    empty = total == 0.0
    if seed_ptr is not None:
        acc *= keep_scale
    acc /= tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (highest + top + tl.log2(total)) * LN_2)
    d = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (d < D)[None, :]
    out_ptr += b * stride_ob + h * stride_oh + tl.cast(start, tl.int64) * stride_on
    local = tl.arange(0, BLOCK_Q)[:, None] * stride_on + d[None, :]
    tl.store(out_ptr + local, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + tl.cast(batch_head, tl.int64) * N + row, lse, mask=row < N)


@triton.jit
def _tile(
    acc, total, highest, start, q, k_ptr, v_ptr, table, query_word, k_code_ptr, last_code,
    key_mask_ptr, seed_ptr, row, batch_head, top, N, M, T, scale, rate_31,
    stride_kn, stride_vn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GATHER: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr,
    FIXED: tl.constexpr,
):  # fmt: skip
    """The sums after one more block of keys. PLAIN: all keys are seen, all indices in the table."""
    column = start + tl.arange(0, BLOCK_K)
    k_ptr += tl.cast(start, tl.int64) * stride_kn
    v_ptr += tl.cast(start, tl.int64) * stride_vn
    k = load_rows(k_ptr, stride_kn, M - start, D, BLOCK_K, BLOCK_D, not PLAIN)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    if BIAS:
        if PLAIN:
            code = tl.load(k_code_ptr + column)
        else:
            code = tl.load(k_code_ptr + column, mask=column < M, other=last_code)
        word = key_words(code)
        scores += table_bias(table, query_word[:, None], word[None, :], T, not PLAIN, GATHER)
    else:
        scores -= top
    if not PLAIN:
        visible = sees(row[:, None], column[None, :], N, M, key_mask_ptr, CAUSAL)
        scores = tl.where(visible, scores, float("-inf"))
    if FIXED:
        weights = tl.exp2(scores)
        total += tl.sum(weights, 1)
    else:
        higher = tl.maximum(highest, tl.max(scores, 1))
        # -inf where a query has seen no key yet
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(weights, 1)
        acc *= shrink[:, None]
        highest = higher
    if seed_ptr is not None:
        kept = keeps(seed_ptr, rate_31, row[:, None], column[None, :], batch_head)
        weights = tl.where(kept, weights, 0.0)
    v = load_rows(v_ptr, stride_vn, M - start, D, BLOCK_K, BLOCK_D, not PLAIN)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, highest
