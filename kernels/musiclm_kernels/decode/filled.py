"""The body on a CPU that is not being compiled: the definition over the slots that anyone filled."""

import torch
from torch import Tensor

from musiclm_kernels.decode import reference


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    q_code: Tensor | None,
    k_codes: Tensor | None,
    offset: int,
    scale: float,
    key_mask: Tensor | None,
    null_kv: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    window: int | None,
    counters: Tensor | None,
) -> Tensor:
    """`reference.decode_attention`. Slots that no row sees are not read, and nothing is masked where
    every row sees every slot that is read."""
    if q.shape[0] == 0:
        return torch.empty_like(q)
    if q.device.type != "cpu":  # float64 on a GPU, which a look at the lengths would hold up
        return reference.attend(
            q, k_cache, v_cache, table, q_code, k_codes, offset, scale,
            reference.visible_slots(lengths, k_cache.shape[2], key_mask, window),
            null_kv, k_scales, v_scales,
        )  # fmt: skip
    shortest, longest = (int(length) for length in lengths.aminmax())
    if shortest < 0 or longest > k_cache.shape[2]:
        raise ValueError(f"lengths span {shortest} to {longest}, wanted 0 to {k_cache.shape[2]}")
    seen = slice(0 if window is None else max(0, shortest - window), longest)
    visible = None
    if shortest < longest or key_mask is not None:
        visible = reference.visible_slots(lengths, k_cache.shape[2], key_mask, window)[:, seen]
    k_codes = None if k_codes is None else k_codes[:, seen]
    k_scales, v_scales = (None if x is None else x[:, :, seen] for x in (k_scales, v_scales))
    return reference.attend(
        q, k_cache[:, :, seen], v_cache[:, :, seen], table, q_code, k_codes, offset, scale, visible,
        null_kv, k_scales, v_scales,
    )  # fmt: skip
