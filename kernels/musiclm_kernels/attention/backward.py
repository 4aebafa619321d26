"""Backward attention: one pass that owns keys and walks over queries, one the other way round.

Both recompute the weights from the saved log-sum (FlashAttention-2, arXiv 2307.08691, section 3.2),
so that no sum crosses programs and the gradients are the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.attention.launch import Problem, keys_config, queries_config
from musiclm_kernels.attention.table_gradient import table_gradient
from musiclm_kernels.attention.tile import (
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

WHOLE_ROWS = 128  # every block of queries divides it
PREPARED = 64  # queries of a program that prepares them
SUMMED = 1024  # elements of a program that adds up heads


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
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
    wants_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The launcher: `reference.attention_backward` in three kernels, and those of the table."""
    problem = Problem.of(
        q, k, v, table, q_codes, k_codes, offset, causal, key_mask, scale, dropout, dropout_seed
    )
    B, H, N, M, D = problem.B, problem.H, problem.N, problem.M, problem.D
    grad_q, grad_k, grad_v = empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)
    if q.numel() == 0 or M == 0:
        grads = grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
        return *grads, lse.new_zeros(H, problem.T if wants_table else 0)
    grad_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, out))
    lse = lse.contiguous()
    strides_w = grad_out.stride()[:3]
    rows = triton.cdiv(N, WHOLE_ROWS) * WHOLE_ROWS
    log_sums = torch.empty(B, H, rows, dtype=torch.float32, device=q.device)
    deltas = torch.empty_like(log_sums)
    num_code_rows = 0 if q_codes is None else len(q_codes)
    words = torch.empty(num_code_rows, rows, dtype=torch.uint32, device=q.device)
    _prepare[(rows // PREPARED * H * B,)](
        grad_out, out, lse, problem.q_codes, log_sums, deltas, words, offset, H, N, problem.T,
        rows, num_code_rows, *strides_w, *out.stride()[:3], D, problem.constants["BLOCK_D"], PREPARED, num_warps=8,
    )  # fmt: skip
    # Query heads that share a key head leave a part each: more programs, and short ones.
    group = H // problem.num_key_heads
    part_k, part_v = grad_k, grad_v
    if group > 1:
        part_k, part_v = torch.empty(2, B, H, M, D, dtype=torch.float32, device=q.device)
    config = keys_config(problem)
    _grad_keys_values[(triton.cdiv(M, config.block_k) * H * B,)](
        *problem.tensors, grad_out, log_sums, deltas, words, part_k, part_v,
        *strides_w, *part_k.stride()[:3], *part_v.stride()[:3], rows, *problem.sizes, *problem.strides, **problem.constants, **config.options,
    )  # fmt: skip
    if group > 1:
        head = M * D
        for part, grad in ((part_k, grad_k), (part_v, grad_v)):
            _sum_heads[(triton.cdiv(head, SUMMED) * problem.num_key_heads * B,)](
                part, grad, head, problem.num_key_heads, *grad.stride()[:3], D, group, SUMMED
            )
    config = queries_config(problem)
    grid = (triton.cdiv(N, config.block_q) * H * B,)
    _grad_queries[grid](
        *problem.tensors, grad_out, log_sums, deltas, words, grad_q,
        *strides_w, *grad_q.stride()[:3], rows, *problem.sizes, *problem.strides, **problem.constants, **config.options,
    )  # fmt: skip
    if wants_table:
        grad_table = table_gradient(problem, grad_out, log_sums, deltas, words, rows, grid_rows)
    else:
        grad_table = lse.new_empty(H, 0)
    return grad_q, grad_k, grad_v, grad_table


@triton.jit(do_not_specialize=["offset", "H", "N", "T", "num_code_rows"])
def _prepare(
    grad_out_ptr,  # [B, H, N, D]
    out_ptr,  # [B, H, N, D]
    lse_ptr,  # [B, H, N], packed
    q_code_ptr,  # [num_code_rows, N], packed, or None
    log_sum_ptr,  # [B, H, rows], packed
    delta_ptr,  # [B, H, rows], packed
    q_word_ptr,  # [num_code_rows, rows], packed
    offset,
    H,
    N,
    T,
    rows,  # N rounded up to whole blocks
    num_code_rows,
    stride_wb,
    stride_wh,
    stride_wn,
    stride_ob,
    stride_oh,
    stride_on,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What both passes need of each query, ready to be read without a mask:

    the log-sum in base 2, +inf where a query sees no key or does not exist, so that weights are 0;
    delta = sum over D of grad_out * out, which the softmax takes off every score's gradient;
    the word of its code.
    """
    num_blocks = rows // ROWS
    start = tl.program_id(0) % num_blocks * ROWS
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    b = batch_head // H
    h = batch_head % H
    row = start + tl.arange(0, ROWS)
    grad_out_ptr += b * stride_wb + h * stride_wh + tl.cast(start, tl.int64) * stride_wn
    out_ptr += b * stride_ob + h * stride_oh + tl.cast(start, tl.int64) * stride_on
    grad_out = load_rows(grad_out_ptr, stride_wn, N - start, D, ROWS, BLOCK_D, True)
    out = load_rows(out_ptr, stride_on, N - start, D, ROWS, BLOCK_D, True)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + batch_head * N + row, mask=row < N, other=float("-inf")) * LOG2_E
    tl.store(delta_ptr + batch_head * rows + row, delta)
    log_sum = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(log_sum_ptr + batch_head * rows + row, log_sum)
    if q_code_ptr is not None:
        # one head of each row of codes does it for all
        writes = ((h == 0) & (b < num_code_rows)) & (row >= 0)
        code = tl.load(q_code_ptr + b * N + tl.minimum(row, N - 1), mask=writes, other=0)
        tl.store(q_word_ptr + b * rows + row, query_words(code, offset, T), mask=writes)


@triton.jit(do_not_specialize=["offset", "H", "N", "M", "T", "rate_31"])
def _grad_keys_values(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hkv, M, D]
    v_ptr,  # [B, Hkv, M, D]
    table_ptr,  # [H, T] or None
    q_code_ptr,  # [B or 1, N]
    k_code_ptr,  # [B or 1, M]
    key_mask_ptr,  # [B, M] or None
    seed_ptr,  # [] or None
    grad_out_ptr,  # [B, H, N, D]
    log_sum_ptr,  # [B, H, rows], packed
    delta_ptr,  # [B, H, rows], packed
    q_word_ptr,  # [B or 1 or 0, rows], packed
    grad_k_ptr,  # [B, H, M, D]
    grad_v_ptr,  # [B, H, M, D]
    stride_wb,
    stride_wh,
    stride_wn,
    stride_gkb,
    stride_gkh,
    stride_gkn,
    stride_gvb,
    stride_gvh,
    stride_gvn,
    rows,
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
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.cdiv(M, BLOCK_K)
    start_k = tl.program_id(0) % num_blocks * BLOCK_K
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    b = batch_head // H
    h = batch_head % H
    column = start_k + tl.arange(0, BLOCK_K)
    k_ptr += b * stride_kb + h // GROUP * stride_kh + tl.cast(start_k, tl.int64) * stride_kn
    v_ptr += b * stride_vb + h // GROUP * stride_vh + tl.cast(start_k, tl.int64) * stride_vn
    q_ptr += b * stride_qb + h * stride_qh
    grad_out_ptr += b * stride_wb + h * stride_wh
    log_sum_ptr += batch_head * rows
    delta_ptr += batch_head * rows
    k = load_rows(k_ptr, stride_kn, M - start_k, D, BLOCK_K, BLOCK_D, True)
    v = load_rows(v_ptr, stride_vn, M - start_k, D, BLOCK_K, BLOCK_D, True)

    # Queries from `first` on see a key of this block; from `open` to `full`, all of them do.
    first = 0
    open = 0
    if CAUSAL:
        first = tl.maximum(start_k + N - M, 0) // BLOCK_Q * BLOCK_Q
        open = (
            tl.cdiv(tl.maximum(tl.minimum(start_k + BLOCK_K, M) - 1 + N - M, 0), BLOCK_Q) * BLOCK_Q
        )
    full = tl.maximum(N // BLOCK_Q * BLOCK_Q, open)
    key_word = column
    table = table_ptr
    if table_ptr is not None:
        q_code_ptr += b * stride_q_code
        q_word_ptr += tl.where(stride_q_code == 0, 0, b) * rows
        key_code = tl.load(k_code_ptr + b * stride_k_code + tl.minimum(column, M - 1))
        key_word = key_words(key_code)
        table += h * T
        plain = False
        if BLOCK_T > 0:
            table = tl.load(table + tl.minimum(tl.arange(0, BLOCK_T), T - 1)) * LOG2_E
            lowest_q, highest_q = code_range(q_code_ptr, N)
            lowest_k, highest_k = tl.min(key_code).to(tl.int64), tl.max(key_code).to(tl.int64)
            plain = all_in_table(lowest_q, highest_q, lowest_k, highest_k, offset, T)
        full = tl.where(plain, full, open)

    grad_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in tl.range(open, full, BLOCK_Q):
        grad_k, grad_v = _one_block_of_queries(
            grad_k, grad_v, start, k, v, q_ptr, grad_out_ptr, log_sum_ptr, delta_ptr, table,
            q_word_ptr, key_word, seed_ptr, column, batch_head, N, M, T, scale, rate_31,
            keep_scale, stride_qn, stride_wn, D, BLOCK_D, BLOCK_Q, BLOCK_T > 0, CAUSAL, PRECISION,
            table_ptr is not None, True,
        )  # fmt: skip
    # The blocks on both sides of those: on the diagonal, and the last.
    before = (open - first) // BLOCK_Q
    for block in tl.range(0, before + tl.cdiv(N - full, BLOCK_Q)):
        start = tl.where(block < before, first, full - before * BLOCK_Q) + block * BLOCK_Q
        grad_k, grad_v = _one_block_of_queries(
            grad_k, grad_v, start, k, v, q_ptr, grad_out_ptr, log_sum_ptr, delta_ptr, table,
            q_word_ptr, key_word, seed_ptr, column, batch_head, N, M, T, scale, rate_31,
            keep_scale, stride_qn, stride_wn, D, BLOCK_D, BLOCK_Q, BLOCK_T > 0, CAUSAL, PRECISION,
            table_ptr is not None, False,
        )  # fmt: skip

    if seed_ptr is not None:
        grad_v *= keep_scale
    if key_mask_ptr is not None:
        # A key's gradients are its own, so that a hidden key needs no care before this point.
        visible = tl.load(key_mask_ptr + b * M + column, mask=column < M, other=0) != 0
        grad_k = tl.where(visible[:, None], grad_k, 0.0)
        grad_v = tl.where(visible[:, None], grad_v, 0.0)
    d = tl.arange(0, BLOCK_D)
    inside = (column < M)[:, None] & (d < D)[None, :]
    local = tl.arange(0, BLOCK_K)[:, None]
    grad_k_ptr += b * stride_gkb + h * stride_gkh + tl.cast(start_k, tl.int64) * stride_gkn
    grad_v_ptr += b * stride_gvb + h * stride_gvh + tl.cast(start_k, tl.int64) * stride_gvn
    at_k = grad_k_ptr + local * stride_gkn + d[None, :]
    at_v = grad_v_ptr + local * stride_gvn + d[None, :]
    tl.store(at_k, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(at_v, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["head", "Hkv"])
def _sum_heads(
    part_ptr,  # [B, Hkv, GROUP, M, D], packed
    sum_ptr,  # [B, Hkv, M, D]
    head,  # M * D
    Hkv,
    stride_b,
    stride_h,
    stride_n,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """The gradient of a key head, from those of the query heads that share it, in their order."""
    num_blocks = tl.cdiv(head, SUMMED)
    at = tl.program_id(0) % num_blocks * SUMMED + tl.arange(0, SUMMED)
    of_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    total = tl.zeros([SUMMED], tl.float32)
    for g in tl.range(0, GROUP):
        total += tl.load(part_ptr + (of_head * GROUP + g) * head + at, mask=at < head, other=0.0)
    sum_ptr += of_head // Hkv * stride_b + of_head % Hkv * stride_h
    to = sum_ptr + (at // D).to(tl.int64) * stride_n + at % D
    tl.store(to, total.to(sum_ptr.dtype.element_ty), mask=at < head)


@triton.jit
def _one_block_of_queries(
    grad_k, grad_v, start, k, v, q_ptr, grad_out_ptr, log_sum_ptr, delta_ptr, table,
    q_word_ptr, key_word, seed_ptr, column, batch_head, N, M, T, scale, rate_31, keep_scale, stride_qn, stride_wn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, GATHER: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values after one more block of queries; tiles are [keys, queries]."""
    row = start + tl.arange(0, BLOCK_Q)
    q_ptr += tl.cast(start, tl.int64) * stride_qn
    grad_out_ptr += tl.cast(start, tl.int64) * stride_wn
    q = load_rows(q_ptr, stride_qn, N - start, D, BLOCK_Q, BLOCK_D, not PLAIN)
    grad_out = load_rows(grad_out_ptr, stride_wn, N - start, D, BLOCK_Q, BLOCK_D, not PLAIN)
    log_sum = tl.load(log_sum_ptr + row)
    delta = tl.load(delta_ptr + row)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
    if BIAS:
        word = tl.load(q_word_ptr + row)
        scores += table_bias(table, word[None, :], key_word[:, None], T, not PLAIN, GATHER)
    if CAUSAL and not PLAIN:
        visible = sees(row[None, :], column[:, None], N, M, None, CAUSAL)
        scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp2(scores - log_sum[None, :])
    grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
    dropped = weights
    if seed_ptr is not None:
        kept = keeps(seed_ptr, rate_31, row[None, :], column[:, None], batch_head)
        dropped = tl.where(kept, weights, 0.0)
        grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
    grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["offset", "H", "N", "M", "T", "rate_31"])
def _grad_queries(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hkv, M, D]
    v_ptr,  # [B, Hkv, M, D]
    table_ptr,  # [H, T] or None
    q_code_ptr,  # [B or 1, N]
    k_code_ptr,  # [B or 1, M]
    key_mask_ptr,  # [B, M] or None
    seed_ptr,  # [] or None
    grad_out_ptr,  # [B, H, N, D]
    log_sum_ptr,  # [B, H, rows], packed
    delta_ptr,  # [B, H, rows], packed
    q_word_ptr,  # [B or 1 or 0, rows], packed
    grad_q_ptr,  # [B, H, N, D]
    stride_wb,
    stride_wh,
    stride_wn,
    stride_gqb,
    stride_gqh,
    stride_gqn,
    rows,
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
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_Q)
    block = tl.program_id(0) % num_blocks
    if CAUSAL:
        block = num_blocks - 1 - block  # the longest first
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    b = batch_head // H
    h = batch_head % H
    start = block * BLOCK_Q
    row = start + tl.arange(0, BLOCK_Q)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    q_ptr += b * stride_qb + h * stride_qh + tl.cast(start, tl.int64) * stride_qn
    grad_out_ptr += b * stride_wb + h * stride_wh + tl.cast(start, tl.int64) * stride_wn
    q = load_rows(q_ptr, stride_qn, N - start, D, BLOCK_Q, BLOCK_D, True)
    grad_out = load_rows(grad_out_ptr, stride_wn, N - start, D, BLOCK_Q, BLOCK_D, True)
    log_sum = tl.load(log_sum_ptr + batch_head * rows + row)
    delta = tl.load(delta_ptr + batch_head * rows + row)

    end = M
    full = M // BLOCK_K * BLOCK_K  # keys before it need no mask
    if CAUSAL:
        end = tl.maximum(tl.minimum(M, start + BLOCK_Q + M - N), 0)
        full = tl.maximum(tl.minimum(M, start + 1 + M - N), 0) // BLOCK_K * BLOCK_K
    if key_mask_ptr is not None:
        key_mask_ptr += b * M
        full = 0
    table = table_ptr
    query_word = row
    last_code = 0
    if table_ptr is not None:
        query_code = tl.load(q_code_ptr + b * stride_q_code + tl.minimum(row, N - 1))
        query_word = tl.load(q_word_ptr + tl.where(stride_q_code == 0, 0, b) * rows + row)
        k_code_ptr += b * stride_k_code
        last_code = tl.load(k_code_ptr + M - 1)
        table += h * T
        plain = False
        if BLOCK_T > 0:
            table = tl.load(table + tl.minimum(tl.arange(0, BLOCK_T), T - 1)) * LOG2_E
            lowest_k, highest_k = code_range(k_code_ptr, M)
            lowest_q, highest_q = tl.min(query_code).to(tl.int64), tl.max(query_code).to(tl.int64)
            plain = all_in_table(lowest_q, highest_q, lowest_k, highest_k, offset, T)
        full = tl.where(plain, full, 0)

    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start_k in tl.range(0, full, BLOCK_K):
        grad_q = _one_block_of_keys(
            grad_q, start_k, q, grad_out, log_sum, delta, k_ptr, v_ptr, table, query_word, k_code_ptr,
            last_code, key_mask_ptr, seed_ptr, row, batch_head, N, M, T, scale, rate_31,
            keep_scale, stride_kn, stride_vn, D, BLOCK_D, BLOCK_K, BLOCK_T > 0, CAUSAL, PRECISION,
            table_ptr is not None, True,
        )  # fmt: skip
    for start_k in tl.range(full, end, BLOCK_K):
        grad_q = _one_block_of_keys(
            grad_q, start_k, q, grad_out, log_sum, delta, k_ptr, v_ptr, table, query_word, k_code_ptr,
            last_code, key_mask_ptr, seed_ptr, row, batch_head, N, M, T, scale, rate_31,
            keep_scale, stride_kn, stride_vn, D, BLOCK_D, BLOCK_K, BLOCK_T > 0, CAUSAL, PRECISION,
            table_ptr is not None, False,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    inside = (row < N)[:, None] & (d < D)[None, :]
    grad_q_ptr += b * stride_gqb + h * stride_gqh + tl.cast(start, tl.int64) * stride_gqn
    local = tl.arange(0, BLOCK_Q)[:, None] * stride_gqn + d[None, :]
    tl.store(grad_q_ptr + local, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _one_block_of_keys(
    grad_q, start, q, grad_out, log_sum, delta, k_ptr, v_ptr, table, query_word, k_code_ptr,
    last_code, key_mask_ptr, seed_ptr, row, batch_head, N, M, T, scale, rate_31,
    keep_scale, stride_kn, stride_vn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GATHER: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries after one more block of keys; tiles are [queries, keys]."""
    column = start + tl.arange(0, BLOCK_K)
    k_ptr += tl.cast(start, tl.int64) * stride_kn
    v_ptr += tl.cast(start, tl.int64) * stride_vn
    k = load_rows(k_ptr, stride_kn, M - start, D, BLOCK_K, BLOCK_D, not PLAIN)
    v = load_rows(v_ptr, stride_vn, M - start, D, BLOCK_K, BLOCK_D, not PLAIN)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    if BIAS:
        if PLAIN:
            code = tl.load(k_code_ptr + column)
        else:
            code = tl.load(k_code_ptr + column, mask=column < M, other=last_code)
        word = key_words(code)
        scores += table_bias(table, query_word[:, None], word[None, :], T, not PLAIN, GATHER)
    if not PLAIN:
        visible = sees(row[:, None], column[None, :], N, M, key_mask_ptr, CAUSAL)
        scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp2(scores - log_sum[:, None])
    grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    if seed_ptr is not None:
        kept = keeps(seed_ptr, rate_31, row[:, None], column[None, :], batch_head)
        grad_weights = tl.where(kept, grad_weights * keep_scale, 0.0)
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)
