"""The product of a few rows with some rows of a weight, in two ways.

One row at a time: the weights of a program, its slab, are in registers, loaded before the program
waits for the previous kernel, so that they stream while that one ends. Sixteen rows at once: the slab
is the first of several tiles, which pass by for the tensor cores.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from musiclm_kernels.decode_layer.tiles import load_columns, load_tile, normed_tile, row_statistics


@triton.jit
def release_next_kernel(PDL: tl.constexpr):
    """Let the next kernel start, and load its weights, as soon as all programs of this one have."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait for all that the previous kernel wrote. Weights, norms and connections never change, and
    are read before; nothing else is.

    Every kernel of a step waits, so whatever precedes the previous one has ended too.
    """
    if PDL:
        gdc_wait()


@triton.jit
def load_slab(weight_ptr, n, stride, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[N of n, BLOCK_K] in the weight's type: its first columns, zeros beyond K."""
    return load_tile(weight_ptr + n.to(tl.int64)[:, None] * stride, 0, K, BLOCK_K)


@triton.jit
def multiply_row(slab, row):
    """[1, N], from a slab [N, BLOCK_K] and a row [BLOCK_K], in float32."""
    return tl.sum(slab * row[None, :], axis=1)[None, :]


@triton.jit
def multiply_rows(
    x_ptr,  # [B, K]
    weight_ptr,
    slab,  # [N of n, TILE_K], the first columns
    n,
    norm_weight_ptr,  # [K]; None for rows that are multiplied as they are
    norm_bias_ptr,  # [K]
    first_norm_weight,  # [1, TILE_K]
    first_norm_bias,
    norms,  # whether this program's rows are normed after all
    B,
    stride_x,
    stride,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
    NORM_EPSILON: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """[ROWS, N of n] in float32; the rows beyond B are copies of the last one.

    Normed rows and 8-bit weights become the product's type, which holds the latter exactly.
    """
    r = tl.minimum(tl.arange(0, ROWS), B - 1)
    x_rows = x_ptr + r.to(tl.int64)[:, None] * stride_x
    weight_rows = weight_ptr + n.to(tl.int64)[:, None] * stride
    x = load_tile(x_rows, 0, K, TILE_K)
    if norm_weight_ptr is not None:
        mean, deviation = row_statistics(x_rows, x, K, TILE_K, NORM_EPSILON)
        x = normed_tile(x, mean, deviation, first_norm_weight, first_norm_bias, norms)
    total = tl.dot(x.to(PRODUCT), tl.trans(slab.to(PRODUCT)), input_precision="ieee")
    for start in range(TILE_K, K, TILE_K):
        x = load_tile(x_rows, start, K, TILE_K)
        weight = load_tile(weight_rows, start, K, TILE_K)
        if norm_weight_ptr is not None:
            norm_weight = load_columns(norm_weight_ptr, start, K, TILE_K)
            norm_bias = load_columns(norm_bias_ptr, start, K, TILE_K)
            x = normed_tile(x, mean, deviation, norm_weight, norm_bias, norms)
        weight = tl.trans(weight.to(PRODUCT))
        total = tl.dot(x.to(PRODUCT), weight, total, input_precision="ieee")
    return total


@triton.jit
def load_scale(weight_scale_ptr, n):
    """[1, N of n]: the scale of each output channel; None where there is none."""
    scale = None
    if weight_scale_ptr is not None:
        scale = tl.load(weight_scale_ptr + n)[None, :]
    return scale


@triton.jit
def scaled(y, scale):
    if scale is not None:
        y = y * scale
    return y
