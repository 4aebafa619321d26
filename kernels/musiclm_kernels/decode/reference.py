"""Attention of one new token over a cache, in plain PyTorch."""

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    table: Tensor | None = None,
    q_code: Tensor | None = None,
    k_codes: Tensor | None = None,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v over the first lengths[b] slots, in at least fp32, rounded
    once. Reads two lengths back to the host."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, H, D = q.shape
    num_key_heads, num_slots = k_cache.shape[1], k_cache.shape[2]
    scale = D**-0.5 if scale is None else scale
    if B == 0:
        return torch.empty_like(q)
    shortest, longest = (int(length) for length in lengths.aminmax())
    if shortest < 0 or longest > num_slots:
        raise ValueError(f"lengths span {shortest} to {longest}, wanted 0 to {num_slots}")

    keys, values = k_cache[:, :, :longest].to(wide), v_cache[:, :, :longest].to(wide)
    queries = (q.to(wide) * scale).view(B, num_key_heads, H // num_key_heads, D)
    scores = (queries @ keys.mT).view(B, H, longest)
    if table is not None and q_code is not None and k_codes is not None:
        # int64: the difference of two codes within +-2^30 reaches +-2^31
        index = (q_code.to(torch.int64) + offset)[:, None] - k_codes[:, :longest]
        index.clamp_(0, table.shape[1] - 1)
        scores += table.to(wide).t()[index].mT
    if shortest < longest:  # what lies beyond a row's length may be anything, NaN included
        beyond = torch.arange(longest, device=q.device) >= lengths[:, None]
        # Finite, so that a row of length zero weighs the zeros below, and is not NaN.
        scores.masked_fill_(beyond[:, None], torch.finfo(wide).min)
    weights = scores.softmax(-1).view(B, num_key_heads, H // num_key_heads, longest)
    out = weights[..., :shortest] @ values[:, :, :shortest]
    if shortest < longest:
        tail = values[:, :, shortest:].masked_fill(beyond[:, None, shortest:, None], 0.0)
        out += weights[..., shortest:] @ tail
    return out.view(B, H, D).to(q.dtype)
