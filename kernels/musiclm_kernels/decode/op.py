"""Decode attention as a PyTorch op: schema, shape rule, and the public function."""

from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dims,
    check_dtype,
    check_finite,
    check_shape,
)
from musiclm_kernels.decode import filled, reference
from musiclm_kernels.decode.checks import check_caches
from musiclm_kernels.registry import define_op, inlines_on_cpu, without_autocast


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_decode_attention = define_op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? table, Tensor? q_code, "
    "Tensor? k_codes, SymInt offset, float scale, Tensor? key_mask, Tensor? null_kv, "
    "Tensor? k_scales, Tensor? v_scales, SymInt? window, Tensor(a!)? counters) -> Tensor",
    filled.decode_attention,
    _fake,
    kernel="musiclm_kernels.decode.launch:decode_attention",
)


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
    """Attention of one new token per row over the filled part of its cache:
    softmax(scale * q k^T + bias) v, with

        bias[h, j] = table[h, clamp(q_code - k_codes[j] + offset, 0, T - 1)]

    Slots that a row does not attend, those from lengths[b] on above all, are never used, whatever
    they hold. A row that attends nothing gives zeros. On CUDA a row's result does not depend, to
    the bit, on the rest of the batch. Not differentiable: the result carries no gradient.

    Args:
        q: [B, H, D], any float dtype; D at most 256 on CUDA.
        k_cache: [B, Hkv, S, D], q's dtype or float8_e4m3fn; H is a multiple of Hkv, and query head
            h reads key head h // (H / Hkv). Read through its strides; on CUDA the last one is 1.
        v_cache: [B, Hkv, S, D], as k_cache.
        lengths: [B] int32 or int64, filled slots per row, 0 to S, the new token's own included.
        table: [H, T] float32 (float64 beside float64 queries), finite, or None for no bias.
        q_code: [B] int32 within +-2^30; needed with table and only then.
        k_codes: [B, S] or [1, S] int32 within +-2^30; needed with table and only then.
        offset: added to the difference of the codes.
        scale: of q k^T, before the bias, finite; 1 / sqrt(D) if None.
        key_mask: [B, S] bool, True where a slot may be attended.
        null_kv: [2, Hkv, D], q's dtype or float32: a key and a value that every row attends before
            its slots, without bias. Neither mask nor window touches them.
        k_scales: [B, Hkv, S] float32, by which a slot's float8 key is multiplied; needed with float8
            caches and only then.
        v_scales: [B, Hkv, S] float32, the same for values.
        window: attend the last so many filled slots only; at least 1.
        counters: [B * H] int32 or longer, zero before and after, of no two calls that can run at
            once. Only the kernel uses it; made if None, which a loop saves by passing its own.

    Returns:
        [B, H, D], in q's dtype. Every sum runs in fp32, or fp64 for float64 inputs. On CUDA, where
        query heads share a 16-bit or float8 key head, weights are rounded to q's dtype before they
        multiply the values, as in FlashAttention.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, a scale is not finite, or
            the table comes without codes, or codes without a table; on a CPU, outside of
            torch.compile, a length outside 0 to S; on CUDA, q wider than 256, a cache whose last
            stride is not 1, or float8 on a GPU older than compute capability 8.9.

    Source: `biased_attention` with N = 1 and a key mask from lengths; slots divided among programs
    as in Flash-Decoding (Dao et al., 2023).
    """
    check_dims("q", q, "B H D")
    check_dtype("q", q, *FLOATS)
    B, H, D = q.shape
    if D == 0:
        raise ValueError(f"q has shape {(B, H, D)}, wanted a width of at least 1")
    check_dims("k_cache", k_cache, "B Hkv S D")
    num_key_heads, S = k_cache.shape[1], k_cache.shape[2]
    if num_key_heads == 0 or H % num_key_heads:
        raise ValueError(f"k_cache has {num_key_heads} heads, wanted a divisor of q's {H}")
    check_shape("k_cache", k_cache, B, num_key_heads, S, D)
    check_caches(q, k_cache, v_cache, k_scales, v_scales)
    check_shape("lengths", lengths, B)
    check_dtype("lengths", lengths, *INTS)
    check_device("lengths", lengths, q.device)
    _check_bias(q, S, table, q_code, k_codes)
    if key_mask is not None:
        check_shape("key_mask", key_mask, B, S)
        check_dtype("key_mask", key_mask, torch.bool)
        check_device("key_mask", key_mask, q.device)
    if null_kv is not None:
        check_shape("null_kv", null_kv, 2, num_key_heads, D)
        check_dtype("null_kv", null_kv, q.dtype, torch.float32)
        check_device("null_kv", null_kv, q.device)
        null_kv = null_kv.detach()
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, wanted at least 1")
    if scale is not None:
        check_finite("scale", scale)
    scale = D**-0.5 if scale is None else scale
    _check_counters(counters, B * H, q.device)
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    table = None if table is None else table.detach()
    if inlines_on_cpu(q):
        return without_autocast(reference.decode_attention)(
            q, k_cache, v_cache, lengths, table=table, q_code=q_code, k_codes=k_codes,
            offset=offset, scale=scale, key_mask=key_mask, null_kv=null_kv,
            k_scales=k_scales, v_scales=v_scales, window=window,
        )  # fmt: skip
    return _decode_attention(
        q, k_cache, v_cache, lengths, table, q_code, k_codes, offset, scale, key_mask, null_kv,
        k_scales, v_scales, window, counters,
    )  # fmt: skip


def _check_bias(
    q: Tensor, S: int, table: Tensor | None, q_code: Tensor | None, k_codes: Tensor | None
) -> None:
    B, H, _ = q.shape
    if table is None:
        for name, codes in (("q_code", q_code), ("k_codes", k_codes)):
            if codes is not None:
                raise ValueError(f"{name} is given without a table, wanted None")
        return
    check_dims("table", table, "H T")
    if table.shape[0] != H or table.shape[1] == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}, wanted ({H}, T), T at least 1")
    check_dtype("table", table, torch.promote_types(q.dtype, torch.float32), torch.float32)
    check_device("table", table, q.device)
    if q_code is None:
        raise ValueError(f"q_code is None, wanted ({B},) int32 with a table")
    check_shape("q_code", q_code, B)
    if k_codes is None:
        raise ValueError(f"k_codes is None, wanted ({B} or 1, {S}) int32 with a table")
    if k_codes.dim() != 2 or k_codes.shape[0] not in (1, B) or k_codes.shape[1] != S:
        raise ValueError(f"k_codes has shape {tuple(k_codes.shape)}, wanted ({B} or 1, {S})")
    for name, codes in (("q_code", q_code), ("k_codes", k_codes)):
        check_dtype(name, codes, torch.int32)
        check_device(name, codes, q.device)


def _check_counters(counters: Tensor | None, wanted: int, device: torch.device) -> None:
    if counters is None:
        return
    if counters.dim() != 1 or counters.shape[0] < wanted or not counters.is_contiguous():
        raise ValueError(
            f"counters has shape {tuple(counters.shape)}, wanted ({wanted} or more,), contiguous"
        )
    check_dtype("counters", counters, torch.int32)
    check_device("counters", counters, device)
