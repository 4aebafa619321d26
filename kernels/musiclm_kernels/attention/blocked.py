"""The definition of biased attention, a block of queries at a time: the body on a CPU.

No tensor of N * M elements a head exists, and a block's scores stay in the processor's cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.attention import reference
from musiclm_kernels.layout import empty_rows_like

BLOCK_SCORES = 2**19  # of all heads; 2 MB in float32, a core's own cache
MIN_QUERIES = 32  # below it, the matrix products of a block are too thin


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
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_and_lse`."""
    out = empty_rows_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for rows, queries, keys in _blocks(q, k, causal):
        out[rows, :, queries], lse[rows, :, queries] = reference.attention_and_lse(
            q[rows, :, queries], k[rows, :, keys], v[rows, :, keys], table,
            _codes(q_codes, rows, queries), _codes(k_codes, rows, keys), offset, causal,
            None if key_mask is None else key_mask[rows, keys], scale, *options,
            first_batch=rows.start, first_query=queries.start,
        )  # fmt: skip
    return out, lse


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
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.attention_backward`; keys, values and the table are summed over blocks in fp32."""
    wants_table = options[-1]
    grad_q, grad_k, grad_v = empty_rows_like(q), empty_rows_like(k), empty_rows_like(v)
    sum_k, sum_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (grad_k, grad_v))
    grad_table = lse.new_zeros(q.shape[1], 0)
    if wants_table and table is not None:
        grad_table = torch.zeros_like(table, memory_format=torch.contiguous_format)
    for rows, queries, keys in _blocks(q, k, causal):
        # Wide, so that a block's part of a sum is not rounded before it is added.
        wide_k, wide_v = k[rows, :, keys].to(lse.dtype), v[rows, :, keys].to(lse.dtype)
        part_q, part_k, part_v, part_table = reference.attention_backward(
            grad_out[rows, :, queries], q[rows, :, queries], wide_k, wide_v,
            out[rows, :, queries], lse[rows, :, queries], table,
            _codes(q_codes, rows, queries), _codes(k_codes, rows, keys), offset, causal,
            None if key_mask is None else key_mask[rows, keys], scale, *options,
            first_batch=rows.start, first_query=queries.start,
        )  # fmt: skip
        grad_q[rows, :, queries] = part_q
        sum_k[rows, :, keys] += part_k
        sum_v[rows, :, keys] += part_v
        grad_table += part_table
    return grad_q, grad_k.copy_(sum_k), grad_v.copy_(sum_v), grad_table


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Batch rows, queries and keys of each block. Causal queries see a beginning of the keys, which
    ends where the block does, so that the definition's rule holds within a block as it stands."""
    B, H, N, _ = q.shape
    M = k.shape[2]
    step_n = min(N, max(MIN_QUERIES, BLOCK_SCORES // max(1, H * M)))
    step_b = 1 if step_n < N else max(1, BLOCK_SCORES // max(1, H * N * M))
    for b in range(0, B, step_b):
        for n in range(0, N, max(1, step_n)):
            end = min(n + step_n, N)
            seen = max(0, end + M - N) if causal else M
            yield slice(b, min(b + step_b, B)), slice(n, end), slice(0, seen)


def _codes(codes: Tensor | None, rows: slice, places: slice) -> Tensor | None:
    if codes is None:
        return None
    return codes[:, places] if len(codes) == 1 else codes[rows, places]
