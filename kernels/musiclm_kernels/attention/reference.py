"""Attention with a positional bias read from a table, in plain PyTorch.

Dimensions: B batch, H query heads, Hkv key heads (G = H / Hkv queries share one), N queries,
M keys, D width, T table entries.
"""

import torch
from torch import Tensor

from musiclm_kernels.ordered_sum import sum_rows_by_index
from musiclm_kernels.philox import WORD, philox_4x32


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    q_codes: Tensor | None = None,
    k_codes: Tensor | None = None,
    offset: int = 0,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    score_bound: Tensor | None = None,
    grid_rows: int = 1,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, with bias[h, i, j] = table[h, q_code[i] - k_code[j] + offset]
    clamped into the table. In at least fp32, rounded once."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = None
    if dropout > 0:
        seed = torch.as_tensor(draw_seed() if dropout_seed is None else dropout_seed)
    return attention_and_lse(
        q, k, v, table, q_codes, k_codes, offset, causal, key_mask, scale,
        dropout, seed, score_bound, grid_rows,
    )[0]  # fmt: skip


def draw_seed(device: torch.device | None = None) -> Tensor:
    """int64 [] from torch's generator of the device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


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
    *,
    first_batch: int = 0,
    first_query: int = 0,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, D], and the log of the sum of exp(score) [B, H, N] that the backward
    pass reads: -inf for a query that sees no key.

    score_bound and grid_rows only speed a kernel up. first_batch and first_query say where these
    queries stand among all, for the choices of dropout.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    index = _table_index(table, q_codes, k_codes, offset)
    scores = _scores(q, k, table, index, causal, key_mask, scale)
    # The shift cancels in the quotient; finite, so that a row of -inf becomes zeros, not NaN.
    shift = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if dropout_seed is not None:
        weights = weights * _dropout(weights, dropout, dropout_seed, first_batch, first_query)
    out = _share(weights, k) @ v.to(wide)
    out = out.view(q.shape) / total.masked_fill(total == 0, 1.0)
    return out.to(q.dtype), (shift + total.log()).squeeze(-1)


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
    *,
    first_batch: int = 0,
    first_query: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the table ([H, 0] unless it is wanted), the weights recomputed."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_out, wide_v = grad_out.to(wide), v.to(wide)
    index = _table_index(table, q_codes, k_codes, offset)
    scores = _scores(q, k, table, index, causal, key_mask, scale)
    weights = scores.sub_(lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp_()

    dropped = weights
    grad_scores = (_share(grad_out, k) @ wide_v.mT).view(weights.shape)
    if dropout_seed is not None:
        factor = _dropout(weights, dropout, dropout_seed, first_batch, first_query)
        dropped = weights * factor
        grad_scores *= factor
    grad_v = _share(dropped, k).mT @ _share(grad_out, k)
    grad_scores -= (grad_out * out).sum(-1, keepdim=True)
    grad_scores *= weights
    grad_q = (_share(grad_scores, k) @ k.to(wide)).view(q.shape) * scale
    grad_k = (_share(grad_scores, k).mT @ _share(q.to(wide), k)) * scale
    if wants_table:
        assert table is not None and index is not None
        grad_table = _table_gradient(grad_scores, index, table)
    else:
        grad_table = lse.new_empty(q.shape[1], 0)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_table


def _share(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, N, C] as [B, Hkv, G * N, C]: the queries that share a key head side by side."""
    B, H, N, C = x.shape
    return x.reshape(B, k.shape[1], H // k.shape[1] * N, C)


def _scores(
    q: Tensor,
    k: Tensor,
    table: Tensor | None,
    index: Tensor | None,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """[B, H, N, M], with -inf where a query does not see a key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    H, N, M = q.shape[1], q.shape[2], k.shape[2]
    scores = (_share(q.to(wide) * scale, k) @ k.to(wide).mT).view(*q.shape[:3], M)
    if table is not None and index is not None:
        # gather: half the time of table[:, index] on CPU at 400 x 400
        bias = table.to(wide).gather(1, index.flatten().expand(H, -1))
        scores += bias.view(H, *index.shape).transpose(0, 1)
    if causal:
        sees = torch.ones(N, M, dtype=torch.bool, device=q.device).tril_(M - N)
        scores.masked_fill_(~sees, -torch.inf)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None, :], -torch.inf)
    return scores


def _table_index(
    table: Tensor | None, q_codes: Tensor | None, k_codes: Tensor | None, offset: int
) -> Tensor | None:
    """[B or 1, N, M] int64; codes that the batch shares are not repeated."""
    if table is None or q_codes is None or k_codes is None:
        return None
    # int64: the difference of two codes within +-2^30 reaches +-2^31
    queries, keys = q_codes.to(torch.int64) + offset, k_codes.to(torch.int64)
    return (queries[:, :, None] - keys[:, None, :]).clamp_(0, table.shape[1] - 1)


def _table_gradient(grad_scores: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """[H, T]: the sum of grad_scores over the pairs that read each entry, in a fixed order."""
    H, T = table.shape
    if index.shape[0] == 1:
        grad_scores = grad_scores.sum(0, keepdim=True)
    rows = grad_scores.permute(0, 2, 3, 1).reshape(-1, H)
    return sum_rows_by_index(rows, index.flatten(), T).t().contiguous().to(table.dtype)


def _dropout(
    weights: Tensor, rate: float, seed: Tensor, first_batch: int, first_query: int
) -> Tensor:
    """1 / (1 - rate) where a weight [B, H, N, M] is kept, else 0.

    The choice is Philox of (key, query, batch and head) under the seed: the same in every body.
    """
    B, H, N, M = weights.shape

    def count(size: int, first: int = 0) -> Tensor:
        return torch.arange(first, first + size, device=weights.device)

    seed = seed.to(weights.device)
    batch_head = (count(B, first_batch)[:, None] * H + count(H))[:, :, None, None]
    counter = (count(M), count(N, first_query)[:, None], batch_head, torch.zeros_like(seed))
    word, *_ = philox_4x32(counter, (seed & WORD, (seed >> 32) & WORD))
    return (word >> 1 >= dropout_threshold(rate)).to(weights.dtype) / (1 - rate)


def dropout_threshold(rate: float) -> int:
    """The 31-bit word below which a weight is dropped."""
    return round(rate * 2**31)
