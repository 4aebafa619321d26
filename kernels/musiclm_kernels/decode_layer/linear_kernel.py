"""A layer norm, a projection and an activation in Triton.

A program covers BLOCK_N outputs of all rows: as many rows of the weight, or with geglu twice as many,
those of the values and those of their gates.

Dimensions: B rows, K columns, N outputs.
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


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _store_activated(y_ptr, rows, B, n, N, value, gate, ACTIVATION: tl.constexpr):
    y = value
    if ACTIVATION == "gelu":
        y = _gelu(y)
    elif ACTIVATION == "geglu":
        y *= _gelu(gate)
    at = y_ptr + rows.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(rows < B)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["B"])
def linear_kernel(
    x_ptr,  # [B, K]; where ROWS is 1 also [B, streams, K]
    weight_ptr,  # [N or 2 N, K], strided
    weight_scale_ptr,  # [N or 2 N]
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    connection_weight_ptr,  # [streams + 2, K]
    connection_scale_ptr,  # [streams + 2]
    connection_static_ptr,  # [streams, streams + 2]
    mix_ptr,  # [B, streams, streams + 2], written
    y_ptr,  # [B, N], written
    B,
    stride_x,
    stride_weight,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    clamped = tl.minimum(n, N - 1)

    if ROWS > 1:
        weight_rows = clamped
        if ACTIVATION == "geglu":  # value, gate, value, gate, ...: one product for both
            both = tl.arange(0, 2 * BLOCK_N)
            weight_rows = tl.minimum(program * BLOCK_N + both // 2, N - 1) + both % 2 * N
        scale = load_scale(weight_scale_ptr, weight_rows)
        slab = load_slab(weight_ptr, weight_rows, stride_weight, K, BLOCK_K)
        norm_weight = load_columns(norm_weight_ptr, 0, K, BLOCK_K)
        norm_bias = load_columns(norm_bias_ptr, 0, K, BLOCK_K)
        wait_for_previous_kernel(PDL)
        y = multiply_rows(
            x_ptr, weight_ptr, slab, weight_rows, norm_weight_ptr, norm_bias_ptr,
            norm_weight, norm_bias, True, B,
            stride_x, stride_weight, K, ROWS, BLOCK_K, NORM_EPSILON, PRODUCT,
        )  # fmt: skip
        value = scaled(y, scale)
        gate = value
        if ACTIVATION == "geglu":
            value, gate = tl.split(tl.reshape(value, [ROWS, BLOCK_N, 2]))
        _store_activated(y_ptr, tl.arange(0, ROWS), B, n, N, value, gate, ACTIVATION)
    else:
        scale = load_scale(weight_scale_ptr, clamped)
        gate_scale = scale
        slab = load_slab(weight_ptr, clamped, stride_weight, K, BLOCK_K)
        gate_slab = slab
        if ACTIVATION == "geglu":
            gate_scale = load_scale(weight_scale_ptr, N + clamped)
            gate_slab = load_slab(weight_ptr, N + clamped, stride_weight, K, BLOCK_K)
        norm_weight = load_vector(norm_weight_ptr, K, BLOCK_K)
        norm_bias = load_vector(norm_bias_ptr, K, BLOCK_K)
        if NUM_STREAMS > 0:
            # Each program needs the first column, and the first of them store one each.
            own = tl.minimum(program, NUM_STREAMS + 1)
            first_weight = load_vector(connection_weight_ptr, K, BLOCK_K)
            own_weight = load_vector(connection_weight_ptr + own * K, K, BLOCK_K)
        wait_for_previous_kernel(PDL)

        row = load_row(x_ptr, 0, stride_x, NUM_STREAMS, K, BLOCK_K)
        slab = slab.to(tl.float32)
        gate_slab = gate_slab.to(tl.float32)
        tl.assume(B > 0)
        for b in range(B):
            x = row
            row = load_row(x_ptr, tl.minimum(b + 1, B - 1), stride_x, NUM_STREAMS, K, BLOCK_K)
            if NUM_STREAMS > 0:
                x = read_and_store_mix(
                    x, first_weight, own_weight, own, program, b, connection_scale_ptr,
                    connection_static_ptr, mix_ptr, NUM_STREAMS, UNIT_EPSILON,
                )  # fmt: skip
            x = layer_norm(x, norm_weight, norm_bias, K, BLOCK_K, NORM_EPSILON)
            value = scaled(multiply_row(slab, x), scale)
            gate = value
            if ACTIVATION == "geglu":
                gate = scaled(multiply_row(gate_slab, x), gate_scale)
            _store_activated(y_ptr, b + tl.arange(0, 1), B, n, N, value, gate, ACTIVATION)
