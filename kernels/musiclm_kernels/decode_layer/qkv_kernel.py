"""A layer norm, the projection to queries, keys and values, and the step into the cache in Triton.

A program covers BLOCK_N rows of the weight, of all rows of x: some dimensions of one head. With unit
queries and keys, and for float8 caches, it covers a whole head, whose length or peak it needs.

Dimensions: B rows, K columns, H query heads, Hkv key heads, D width of a head, S slots.
"""

import triton
import triton.language as tl

from musiclm_kernels.decode_layer.product import (
    load_scale,
    load_slab,
    multiply_row,
    multiply_rows,
    release_next_kernel,
    scaled,
    wait_for_previous_kernel,
)
from musiclm_kernels.decode_layer.row import (
    layer_norm,
    load_row,
    load_vector,
    read_and_store_mix,
)
from musiclm_kernels.decode_layer.tiles import load_columns

FLOAT8_LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # as the definition says


@triton.jit
def _with_gain(y, gain_ptr, head, stride_gain, d, inside, UNIT_EPSILON: tl.constexpr):
    """Rows [rows, D] of length 1, times the gain."""
    square = tl.sum(tl.where(inside[None, :], y * y, 0.0), axis=1)
    clamped = tl.where(square < UNIT_EPSILON * UNIT_EPSILON, UNIT_EPSILON * UNIT_EPSILON, square)
    gain = tl.load(gain_ptr + head * stride_gain + d, mask=inside, other=0.0).to(tl.float32)
    return y * tl.rsqrt(clamped)[:, None] * gain[None, :]


@triton.jit
def _load_positions(position_ptr, rows, B):
    return tl.load(position_ptr + rows, mask=rows < B, other=-1).to(tl.int64)


@triton.jit
def _load_first_values(
    first_value_ptr, rows, B, head, d, inside, H: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr
):
    """[rows, d] of the first layer's values, where the head is one of values; None without them."""
    first = None
    if first_value_ptr is not None:
        at = (rows.to(tl.int64) * Hkv + head - H - Hkv)[:, None] * D + d[None, :]
        mask = (rows < B)[:, None] & (inside & (head >= H + Hkv))[None, :]
        first = tl.load(first_value_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return first


@triton.jit
def _append(
    cache_ptr,
    scales_ptr,
    y,
    rows,
    head,
    d,
    inside,
    position,  # [rows]
    S,
    stride_b,
    stride_h,
    stride_s,
    stride_scale_b,
    stride_scale_h,
    stride_scale_s,
):
    """Write y [rows, d] into the slot of each row's position; nothing where that is negative."""
    writes = position >= 0
    slot = position % S
    row = rows.to(tl.int64)
    if scales_ptr is not None:
        peak = tl.max(tl.where(inside[None, :], tl.abs(y), 0.0), axis=1)
        scale = peak / FLOAT8_LARGEST
        scale = tl.where(scale >= SMALLEST_SCALE, scale, 1.0)
        at = scales_ptr + row * stride_scale_b + head * stride_scale_h + slot * stride_scale_s
        tl.store(at, scale, mask=writes)
        # Division may round to just above the largest.
        y = tl.minimum(tl.maximum(y / scale[:, None], -FLOAT8_LARGEST), FLOAT8_LARGEST)
    at = cache_ptr + (row * stride_b + head * stride_h + slot * stride_s)[:, None] + d[None, :]
    tl.store(at, y.to(cache_ptr.dtype.element_ty), mask=writes[:, None] & inside[None, :])


@triton.jit
def _store_head(
    y,  # [rows, BLOCK_N]
    rows,
    B,
    head,  # of H, then Hkv keys, then Hkv values
    d,
    inside,
    q_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scales_ptr,
    v_scales_ptr,
    position,  # [rows]
    first,  # [rows, BLOCK_N] of the first layer's values
    q_gain_ptr,
    k_gain_ptr,
    stride_q_gain,
    stride_k_gain,
    S,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_scale_b,
    stride_scale_h,
    stride_scale_s,
    H: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    UNIT_EPSILON: tl.constexpr,
):
    mask = (rows < B)[:, None] & inside[None, :]
    if head < H:
        if q_gain_ptr is not None:
            y = _with_gain(y, q_gain_ptr, head, stride_q_gain, d, inside, UNIT_EPSILON)
        at = q_ptr + (rows.to(tl.int64) * H + head)[:, None] * D + d[None, :]
        tl.store(at, y.to(q_ptr.dtype.element_ty), mask=mask)
    elif head < H + Hkv:
        if k_gain_ptr is not None:
            y = _with_gain(y, k_gain_ptr, head - H, stride_k_gain, d, inside, UNIT_EPSILON)
        _append(
            k_cache_ptr, k_scales_ptr, y, rows, head - H, d, inside, position, S,
            stride_kb, stride_kh, stride_ks, stride_scale_b, stride_scale_h, stride_scale_s,
        )  # fmt: skip
    else:
        own = (rows.to(tl.int64) * Hkv + head - H - Hkv)[:, None] * D + d[None, :]
        tl.store(v_ptr + own, y.to(v_ptr.dtype.element_ty), mask=mask)
        if first is not None:
            y = 0.5 * (y + first)
        _append(
            v_cache_ptr, v_scales_ptr, y, rows, head - H - Hkv, d, inside, position, S,
            stride_vb, stride_vh, stride_vs, stride_scale_b, stride_scale_h, stride_scale_s,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "S"])
def qkv_kernel(
    x_ptr,  # [B, K] or [B, streams, K] where ROWS is 1, else [1 or 2, B, K], ready for the product
    weight_ptr,  # [(H + 2 Hkv) D, K], strided
    weight_scale_ptr,  # [(H + 2 Hkv) D]
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    connection_weight_ptr,  # [streams + 2, K]
    connection_scale_ptr,  # [streams + 2]
    connection_static_ptr,  # [streams, streams + 2]
    mix_ptr,  # [B, streams, streams + 2], written
    q_ptr,  # [B, H, D], written
    v_ptr,  # [B, Hkv, D], written
    k_cache_ptr,  # [B, Hkv, S, D], strided, written at one slot
    v_cache_ptr,  # [B, Hkv, S, D], strided, written at one slot
    k_scales_ptr,  # [B, Hkv, S], strided, written at one slot
    v_scales_ptr,  # [B, Hkv, S], in the strides of k_scales, written at one slot
    position_ptr,  # [B]
    q_gain_ptr,  # [D] or [H, D]
    k_gain_ptr,  # [D] or [Hkv, D]
    first_value_ptr,  # [B, Hkv, D]
    B,
    S,
    stride_x,
    stride_weight,
    stride_q_gain,
    stride_k_gain,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_scale_b,
    stride_scale_h,
    stride_scale_s,
    H: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE_KV: tl.constexpr,
    NUM_STREAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM_EPSILON: tl.constexpr,
    UNIT_EPSILON: tl.constexpr,
    PRODUCT: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next_kernel(PDL)
    program = tl.program_id(0)
    blocks: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N  # of a head
    head = program // blocks
    d = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (d < D) & (head < H + 2 * Hkv)  # the streams' mix may want more programs than heads do
    n = tl.minimum(head, H + 2 * Hkv - 1) * D + tl.minimum(d, D - 1)
    scale = load_scale(weight_scale_ptr, n)
    slab = load_slab(weight_ptr, n, stride_weight, K, BLOCK_K)

    if ROWS > 1:
        norms = NORMALIZE_KV or head < H
        norm_weight = load_columns(norm_weight_ptr, 0, K, BLOCK_K)
        norm_bias = load_columns(norm_bias_ptr, 0, K, BLOCK_K)
        wait_for_previous_kernel(PDL)
        rows = tl.arange(0, ROWS)
        position = _load_positions(position_ptr, rows, B)
        first = _load_first_values(first_value_ptr, rows, B, head, d, inside, H, Hkv, D)
        y = multiply_rows(
            x_ptr, weight_ptr, slab, n, norm_weight_ptr, norm_bias_ptr,
            norm_weight, norm_bias, norms, B,
            stride_x, stride_weight, K, ROWS, BLOCK_K, NORM_EPSILON, PRODUCT,
        )  # fmt: skip
        _store_head(
            scaled(y, scale), rows, B, head, d, inside, q_ptr, v_ptr,
            k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, position, first,
            q_gain_ptr, k_gain_ptr, stride_q_gain, stride_k_gain, S,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
            stride_scale_b, stride_scale_h, stride_scale_s, H, Hkv, D, UNIT_EPSILON,
        )  # fmt: skip
    else:
        norm_weight = load_vector(norm_weight_ptr, K, BLOCK_K)
        norm_bias = load_vector(norm_bias_ptr, K, BLOCK_K)
        if NUM_STREAMS > 0:
            own = tl.minimum(program, NUM_STREAMS + 1)
            first_weight = load_vector(connection_weight_ptr, K, BLOCK_K)
            own_weight = load_vector(connection_weight_ptr + own * K, K, BLOCK_K)
        wait_for_previous_kernel(PDL)

        row = load_row(x_ptr, 0, stride_x, NUM_STREAMS, K, BLOCK_K)
        slab = slab.to(tl.float32)
        tl.assume(B > 0)
        for b in range(B):
            rows = b + tl.arange(0, 1)
            position = _load_positions(position_ptr, rows, B)
            first = _load_first_values(first_value_ptr, rows, B, head, d, inside, H, Hkv, D)
            x = row
            row = load_row(x_ptr, tl.minimum(b + 1, B - 1), stride_x, NUM_STREAMS, K, BLOCK_K)
            if NUM_STREAMS > 0:
                x = read_and_store_mix(
                    x, first_weight, own_weight, own, program, b, connection_scale_ptr,
                    connection_static_ptr, mix_ptr, NUM_STREAMS, UNIT_EPSILON,
                )  # fmt: skip
            normed = layer_norm(x, norm_weight, norm_bias, K, BLOCK_K, NORM_EPSILON)
            if not NORMALIZE_KV:
                normed = tl.where(head < H, normed, x)
            y = scaled(multiply_row(slab, normed), scale)
            _store_head(
                y, rows, B, head, d, inside, q_ptr, v_ptr,
                k_cache_ptr, v_cache_ptr, k_scales_ptr, v_scales_ptr, position, first,
                q_gain_ptr, k_gain_ptr, stride_q_gain, stride_k_gain, S,
                stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
                stride_scale_b, stride_scale_h, stride_scale_s, H, Hkv, D, UNIT_EPSILON,
            )  # fmt: skip
