"""Attention of one new token over a cache, and writing into the cache, in plain PyTorch.

Dimensions: B rows, H query heads, Hkv key heads (G = H / Hkv queries share one), S slots, D width,
T table entries, N new tokens. No shape here depends on what a tensor holds, so that all of it traces.
"""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0


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
    key_mask: Tensor | None = None,
    null_kv: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    window: int | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v over the slots that `visible_slots` names, in at least fp32,
    rounded once. The counters are the kernel's; nothing is counted here."""
    return attend(
        q, k_cache, v_cache, table, q_code, k_codes, offset,
        q.shape[-1] ** -0.5 if scale is None else scale,
        visible_slots(lengths, k_cache.shape[2], key_mask, window), null_kv, k_scales, v_scales,
    )  # fmt: skip


def visible_slots(
    lengths: Tensor, num_slots: int, key_mask: Tensor | None, window: int | None
) -> Tensor:
    """[B, S] bool: filled, among the last `window` that are, and allowed by the mask."""
    slot = torch.arange(num_slots, device=lengths.device)
    visible = slot < lengths[:, None]
    if window is not None:
        visible = visible & (slot >= lengths[:, None] - window)
    return visible if key_mask is None else visible & key_mask


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor | None,
    q_code: Tensor | None,
    k_codes: Tensor | None,
    offset: int,
    scale: float,
    visible: Tensor | None,
    null_kv: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> Tensor:
    """Over the visible slots [B, S], or over all. What others hold may be anything, NaN included."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, H, D = q.shape
    num_key_heads = k_cache.shape[1]
    keys, values = _dequantize(k_cache, k_scales, wide), _dequantize(v_cache, v_scales, wide)
    queries = (q.to(wide) * scale).view(B, num_key_heads, H // num_key_heads, D)
    scores = queries @ keys.mT  # [B, Hkv, G, S]
    if table is not None and q_code is not None and k_codes is not None:
        # int64: the difference of two codes within +-2^30 reaches +-2^31
        index = (q_code.to(torch.int64) + offset)[:, None] - k_codes
        index = index.clamp(0, table.shape[1] - 1)
        bias = table.to(wide)[:, index]  # [H, B, S]
        scores = scores + bias.transpose(0, 1).reshape(scores.shape)
    if visible is not None:
        # Finite, so that a row that sees nothing weighs the zeros below, and is not NaN.
        scores = scores.masked_fill(~visible[:, None, None], torch.finfo(wide).min)
        values = values.masked_fill(~visible[:, None, :, None], 0.0)
    if null_kv is None:
        out = scores.softmax(-1) @ values
    else:
        null_key, null_value = null_kv.to(wide)[:, :, None]  # [Hkv, 1, D] each
        weights = torch.cat((queries @ null_key.mT, scores), -1).softmax(-1)
        out = weights[..., 1:] @ values + weights[..., :1] * null_value
    return out.reshape(B, H, D).to(q.dtype)


def append_to_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Token n of row b goes to slot (positions[b] + n) % S; a negative position writes nothing."""
    (B, Hkv, N, _), S = k.shape, k_cache.shape[2]
    slots = (positions.to(torch.int64)[:, None] + torch.arange(N, device=k.device)) % S
    rows = torch.arange(B, device=k.device)[:, None, None]
    heads = torch.arange(Hkv, device=k.device)[:, None]
    # [B, Hkv, N] together. Of the cache itself: of a view, Inductor would write a copy of it all.
    place = (rows, heads, slots[:, None])
    writes = (positions >= 0)[:, None, None]
    for cache, scales, new in ((k_cache, k_scales, k), (v_cache, v_scales, v)):
        if scales is not None:
            new, new_scales = quantize_rows(new)
            scales[place] = torch.where(writes, new_scales, scales[place])
            # PyTorch does not index float8
            cache, new = cache.view(torch.uint8), new.view(torch.uint8)
        cache[place] = torch.where(writes[..., None], new, cache[place])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> float8 and a float32 scale s = amax|x| / 448 for each row, x ~ float8 * s. A row
    so small that s would not be a normal number, zero above all, has scale 1."""
    x = x.to(torch.float32)
    scales = x.abs().amax(-1) / FLOAT8_MAX
    scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0)
    return (x / scales[..., None]).to(FLOAT8), scales


def _dequantize(cache: Tensor, scales: Tensor | None, wide: torch.dtype) -> Tensor:
    return cache.to(wide) if scales is None else cache.to(wide) * scales.to(wide)[..., None]
