"""The way into a sub-layer from residual streams, for many rows: a launch of its own, a program a row.

Every program of the product would read the streams of all rows and mix them again; here it is done
once. The layer norm is the product's.
"""

import triton
import triton.language as tl

from musiclm_kernels.decode_layer.product import release_next_kernel, wait_for_previous_kernel
from musiclm_kernels.decode_layer.row import load_row, load_vector, mix_column


@triton.jit
def prepare_kernel(
    streams_ptr,  # [B, streams, K]
    connection_weight_ptr,  # [streams + 2, K]
    connection_scale_ptr,  # [streams + 2]
    connection_static_ptr,  # [streams, streams + 2]
    mix_ptr,  # [B, streams, streams + 2], written
    x_ptr,  # [B, K], written: the sub-layer's input
    K: tl.constexpr,
    NUM_STREAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_EPSILON: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next_kernel(PDL)
    b = tl.program_id(0).to(tl.int64)
    first_weight = load_vector(connection_weight_ptr, K, BLOCK_K)
    wait_for_previous_kernel(PDL)

    streams = load_row(streams_ptr, b, NUM_STREAMS * K, NUM_STREAMS, K, BLOCK_K)
    width: tl.constexpr = NUM_STREAMS + 2
    s = tl.arange(0, triton.next_power_of_2(NUM_STREAMS))
    at = mix_ptr + (b * NUM_STREAMS + s) * width
    for column in range(1, width):
        weight = load_vector(connection_weight_ptr + column * K, K, BLOCK_K)
        mix = mix_column(
            streams, weight, connection_scale_ptr, connection_static_ptr, column,
            NUM_STREAMS, UNIT_EPSILON,
        )  # fmt: skip
        tl.store(at + column, mix, mask=s < NUM_STREAMS)
    first = mix_column(
        streams, first_weight, connection_scale_ptr, connection_static_ptr, 0,
        NUM_STREAMS, UNIT_EPSILON,
    )  # fmt: skip
    tl.store(at, first, mask=s < NUM_STREAMS)
    x = tl.sum(first[:, None] * streams, axis=0)
    k = tl.arange(0, BLOCK_K)
    tl.store(x_ptr + b * K + k, x, mask=k < K)
