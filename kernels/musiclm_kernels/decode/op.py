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
from musiclm_kernels.decode import reference
from musiclm_kernels.registry import define_op


def _reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    q_code: Tensor | None,
    k_codes: Tensor | None,
    offset: int,
    scale: float,
) -> Tensor:
    return reference.decode_attention(
        q, k_cache, v_cache, lengths,
        table=table, q_code=q_code, k_codes=k_codes, offset=offset, scale=scale,
    )  # fmt: skip


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_decode_attention = define_op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? table, Tensor? q_code, "
    "Tensor? k_codes, SymInt offset, float scale) -> Tensor",
    _reference,
    _fake,
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
) -> Tensor:
    """Attention of one new token per row over the filled part of its cache:
    softmax(scale * q k^T + bias) v, with

        bias[h, j] = table[h, clamp(q_code - k_codes[j] + offset, 0, T - 1)]

    Slots from lengths[b] on are never used, whatever they hold. A row of length zero gives zeros.
    Not differentiable: the result carries no gradient.

    Args:
        q: [B, H, D], any float dtype.
        k_cache: [B, Hkv, S, D], q's dtype; H is a multiple of Hkv.
        v_cache: [B, Hkv, S, D], q's dtype.
        lengths: [B] int32 or int64, filled slots per row, 0 to S, the new token's own included.
        table: [H, T] float32 (float64 beside float64 queries), or None for no bias.
        q_code: [B] int32 within +-2^30; needed with table and only then.
        k_codes: [B, S] or [1, S] int32 within +-2^30; needed with table and only then.
        offset: added to the difference of the codes.
        scale: of q k^T, before the bias, finite; 1 / sqrt(D) if None.

    Returns:
        [B, H, D], in q's dtype. Every sum runs in fp32, or fp64 for float64 inputs.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, a length is outside
            0 to S, a scale is not finite, or the table comes without codes, or codes without a table.

    Source: `biased_attention` with N = 1 and a key mask from lengths.
    """
    check_dims("q", q, "B H D")
    check_dtype("q", q, *FLOATS)
    B, H, D = q.shape
    check_dims("k_cache", k_cache, "B Hkv S D")
    num_key_heads, S = k_cache.shape[1], k_cache.shape[2]
    if num_key_heads == 0 or H % num_key_heads:
        raise ValueError(f"k_cache has {num_key_heads} heads, wanted a divisor of q's {H}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, B, num_key_heads, S, D)
        check_dtype(name, cache, q.dtype)
        check_device(name, cache, q.device)
    check_shape("lengths", lengths, B)
    check_dtype("lengths", lengths, *INTS)
    check_device("lengths", lengths, q.device)
    _check_bias(q, S, table, q_code, k_codes)
    if scale is not None:
        check_finite("scale", scale)
    scale = D**-0.5 if scale is None else scale
    return _decode_attention(
        q.detach(), k_cache.detach(), v_cache.detach(), lengths,
        None if table is None else table.detach(), q_code, k_codes, offset, scale,
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
