"""What the kernels do with one row before its product: read it, make one of its streams, norm it.

A row stays in registers: K columns, in BLOCK_K of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def load_vector(ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K] float32, zeros beyond K; None where there is no vector."""
    k = tl.arange(0, BLOCK_K)
    if ptr is None:
        vector = None
    elif K == BLOCK_K:
        vector = tl.load(ptr + k).to(tl.float32)
    else:
        vector = tl.load(ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return vector


@triton.jit
def load_row(ptr, b, stride, NUM_STREAMS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row b as float32: [BLOCK_K], or its streams [streams to a power of two, BLOCK_K]."""
    at = ptr + tl.cast(b, tl.int64) * stride
    if NUM_STREAMS == 0:
        row = load_vector(at, K, BLOCK_K)
    else:
        s = tl.arange(0, triton.next_power_of_2(NUM_STREAMS))
        k = tl.arange(0, BLOCK_K)
        inside = (s < NUM_STREAMS)[:, None] & (k < K)[None, :]
        row = tl.load(at + s[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def mix_column(
    streams,  # [S, BLOCK_K]
    connection,  # [BLOCK_K], the column's weights
    scale_ptr,  # [num streams + 2]
    static_ptr,  # [num streams, num streams + 2]
    column,
    NUM_STREAMS: tl.constexpr,
    UNIT_EPSILON: tl.constexpr,
):
    """[S]: tanh(streams / |streams| @ connection) * scale + static."""
    s = tl.arange(0, triton.next_power_of_2(NUM_STREAMS))
    square = tl.sum(streams * streams, axis=1)
    clamped = tl.where(square < UNIT_EPSILON * UNIT_EPSILON, UNIT_EPSILON * UNIT_EPSILON, square)
    score = tl.sum(streams * connection[None, :], axis=1) * tl.rsqrt(clamped)
    # tanh, from what cannot overflow
    shrunk = tl.exp(-2.0 * tl.abs(score))
    tanh = (1.0 - shrunk) / (1.0 + shrunk)
    tanh = tl.where(score < 0, -tanh, tanh)
    width: tl.constexpr = NUM_STREAMS + 2
    static = tl.load(static_ptr + s * width + column, mask=s < NUM_STREAMS, other=0.0)
    return tanh * tl.load(scale_ptr + column) + static


@triton.jit
def read_and_store_mix(
    streams,
    first_weight,
    own_weight,
    own,
    program,
    b,
    scale_ptr,
    static_ptr,
    mix_ptr,
    NUM_STREAMS: tl.constexpr,
    UNIT_EPSILON: tl.constexpr,
):
    """A sub-layer's input [BLOCK_K]; and the program's own column of the mix, stored."""
    if program < NUM_STREAMS + 2:
        column = mix_column(
            streams, own_weight, scale_ptr, static_ptr, own, NUM_STREAMS, UNIT_EPSILON
        )
        s = tl.arange(0, triton.next_power_of_2(NUM_STREAMS))
        at = mix_ptr + (tl.cast(b, tl.int64) * NUM_STREAMS + s) * (NUM_STREAMS + 2) + own
        tl.store(at, column, mask=s < NUM_STREAMS)
    first = mix_column(streams, first_weight, scale_ptr, static_ptr, 0, NUM_STREAMS, UNIT_EPSILON)
    return tl.sum(first[:, None] * streams, axis=0)


@triton.jit
def layer_norm(row, weight, bias, K: tl.constexpr, BLOCK_K: tl.constexpr, EPSILON: tl.constexpr):
    """[BLOCK_K], zeros beyond K; the row as it is where there is no weight."""
    if weight is None:
        normed = row
    else:
        centred = row - tl.sum(row, axis=0) / K
        if K != BLOCK_K:
            centred = tl.where(tl.arange(0, BLOCK_K) < K, centred, 0.0)
        variance = tl.sum(centred * centred, axis=0) / K
        normed = centred * tl.rsqrt(variance + EPSILON) * weight
        if bias is not None:
            normed += bias
    return normed
