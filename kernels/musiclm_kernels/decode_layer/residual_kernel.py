"""A layer norm, a projection and its way back into the residual, in place, in Triton.

A program covers BLOCK_N columns of x, of all rows and streams, and reads no others of x.

Dimensions: B rows, K columns of h, N columns of x.
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
from musiclm_kernels.decode_layer.row import layer_norm, load_row, load_vector
from musiclm_kernels.decode_layer.tiles import load_columns


@triton.jit
def _load_own(
    x_ptr, mix_ptr, rows, B, n, N: tl.constexpr, NUM_STREAMS: tl.constexpr, MIXED: tl.constexpr
):
    """The program's columns of x: [rows, BLOCK_N], or [rows, S, BLOCK_N] after the mix."""
    b = rows.to(tl.int64)
    inside = (rows < B)[:, None] & (n < N)[None, :]
    if NUM_STREAMS == 0:
        own = tl.load(x_ptr + b[:, None] * N + n[None, :], mask=inside, other=0.0)
    else:
        s = tl.arange(0, triton.next_power_of_2(NUM_STREAMS))
        at = (b[:, None] * NUM_STREAMS + s[None, :])[:, :, None] * N + n[None, None, :]
        mask = inside[:, None, :] & (s < NUM_STREAMS)[None, :, None]
        own = tl.load(x_ptr + at, mask=mask, other=0.0)
        if MIXED:
            width: tl.constexpr = NUM_STREAMS + 2
            at = (b[:, None] * NUM_STREAMS + s[None, :])[:, :, None] * width + 1 + s[None, None, :]
            mask = (rows < B)[:, None, None] & (s < NUM_STREAMS)[None, :, None]
            mix = tl.load(mix_ptr + at, mask=mask & (s < NUM_STREAMS)[None, None, :], other=0.0)
            own = tl.sum(mix[:, :, :, None] * own[:, :, None, :], axis=1)
    return own


@triton.jit
def _store_sum(
    x_ptr, mix_ptr, own, y, rows, B, n, N: tl.constexpr, NUM_STREAMS: tl.constexpr
):  # fmt: skip
    b = rows.to(tl.int64)
    inside = (rows < B)[:, None] & (n < N)[None, :]
    if NUM_STREAMS == 0:
        tl.store(x_ptr + b[:, None] * N + n[None, :], own + y, mask=inside)
    else:
        s = tl.arange(0, triton.next_power_of_2(NUM_STREAMS))
        width: tl.constexpr = NUM_STREAMS + 2
        at = (b[:, None] * NUM_STREAMS + s[None, :]) * width + NUM_STREAMS + 1
        mask = (rows < B)[:, None] & (s < NUM_STREAMS)[None, :]
        beta = tl.load(mix_ptr + at, mask=mask, other=0.0)
        at = (b[:, None] * NUM_STREAMS + s[None, :])[:, :, None] * N + n[None, None, :]
        mask = inside[:, None, :] & (s < NUM_STREAMS)[None, :, None]
        tl.store(x_ptr + at, own + beta[:, :, None] * y[:, None, :], mask=mask)


@triton.jit(do_not_specialize=["B"])
def residual_kernel(
    x_ptr,  # [B, N] or [B, streams, N], read and written
    h_ptr,  # [B, K]
    weight_ptr,  # [N, K], strided
    weight_scale_ptr,  # [N]
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    mix_ptr,  # [B, streams, streams + 2]
    B,
    stride_h,
    stride_weight,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_STREAMS: tl.constexpr,
    MIXED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM_EPSILON: tl.constexpr,
    PRODUCT: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next_kernel(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.minimum(n, N - 1)
    scale = load_scale(weight_scale_ptr, clamped)
    slab = load_slab(weight_ptr, clamped, stride_weight, K, BLOCK_K)

    if ROWS > 1:
        rows = tl.arange(0, ROWS)
        norm_weight = load_columns(norm_weight_ptr, 0, K, BLOCK_K)
        norm_bias = load_columns(norm_bias_ptr, 0, K, BLOCK_K)
        wait_for_previous_kernel(PDL)
        y = multiply_rows(
            h_ptr, weight_ptr, slab, clamped, norm_weight_ptr, norm_bias_ptr,
            norm_weight, norm_bias, True, B,
            stride_h, stride_weight, K, ROWS, BLOCK_K, NORM_EPSILON, PRODUCT,
        )  # fmt: skip
        own = _load_own(x_ptr, mix_ptr, rows, B, n, N, NUM_STREAMS, MIXED)
        _store_sum(x_ptr, mix_ptr, own, scaled(y, scale), rows, B, n, N, NUM_STREAMS)
    else:
        norm_weight = load_vector(norm_weight_ptr, K, BLOCK_K)
        norm_bias = load_vector(norm_bias_ptr, K, BLOCK_K)
        wait_for_previous_kernel(PDL)

        row = load_row(h_ptr, 0, stride_h, 0, K, BLOCK_K)
        slab = slab.to(tl.float32)
        tl.assume(B > 0)
        for b in range(B):
            rows = b + tl.arange(0, 1)
            own = _load_own(x_ptr, mix_ptr, rows, B, n, N, NUM_STREAMS, MIXED)
            h = row
            row = load_row(h_ptr, tl.minimum(b + 1, B - 1), stride_h, 0, K, BLOCK_K)
            h = layer_norm(h, norm_weight, norm_bias, K, BLOCK_K, NORM_EPSILON)
            y = scaled(multiply_row(slab, h), scale)
            _store_sum(x_ptr, mix_ptr, own, y, rows, B, n, N, NUM_STREAMS)
