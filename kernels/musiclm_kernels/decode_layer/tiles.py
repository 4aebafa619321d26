"""A layer norm of many rows whose columns pass by in tiles: [rows, TILE_K] of them at a time."""

import triton
import triton.language as tl


@triton.jit
def load_tile(rows_ptr, start, K: tl.constexpr, TILE_K: tl.constexpr):
    """[rows, TILE_K] of the rows that start at rows_ptr [rows, 1]; zeros beyond K."""
    k = start + tl.arange(0, TILE_K)[None, :]
    if K % TILE_K == 0:
        tile = tl.load(rows_ptr + k)
    else:
        tile = tl.load(rows_ptr + k, mask=k < K, other=0.0)
    return tile


@triton.jit
def load_columns(ptr, start, K: tl.constexpr, TILE_K: tl.constexpr):
    """[1, TILE_K] of a vector [K]; None where there is no vector."""
    columns = None
    if ptr is not None:
        columns = load_tile(ptr, start, K, TILE_K)
    return columns


@triton.jit
def _around(tile, centre, start, K: tl.constexpr, TILE_K: tl.constexpr):
    """[rows, TILE_K] float32: the tile's columns less the row's centre, zeros beyond K."""
    shifted = tile.to(tl.float32) - centre[:, None]
    if K % TILE_K != 0:
        k = start + tl.arange(0, TILE_K)[None, :]
        shifted = tl.where(k < K, shifted, 0.0)
    return shifted


@triton.jit
def row_statistics(
    rows_ptr,
    first,  # [rows, TILE_K]: the first tile
    K: tl.constexpr,
    TILE_K: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """[rows] each: mean and reciprocal deviation of K columns, which are read once.

    Both sums are around the first tile's mean c. The tile is a share TILE_K / K of the row, and so
    (c - mean)^2 is less than variance * K / TILE_K: the difference at the end cancels no more than that.
    """
    centre = tl.sum(first.to(tl.float32), axis=1) / min(K, TILE_K)
    shifted = _around(first, centre, 0, K, TILE_K)
    sums = shifted
    squares = shifted * shifted
    for start in tl.range(TILE_K, K, TILE_K, num_stages=1):
        tile = load_tile(rows_ptr, start, K, TILE_K)
        shifted = _around(tile, centre, start, K, TILE_K)
        sums += shifted
        squares += shifted * shifted
    distance = tl.sum(sums, axis=1) / K
    variance = tl.sum(squares, axis=1) / K - distance * distance
    return centre + distance, tl.rsqrt(tl.maximum(variance, 0.0) + EPSILON)


@triton.jit
def normed_tile(x, mean, deviation, weight, bias, norms):
    """The tile after the norm, float32; as it is where `norms` is false."""
    x = x.to(tl.float32)
    normed = (x - mean[:, None]) * deviation[:, None] * weight
    if bias is not None:
        normed += bias
    return tl.where(norms, normed, x)
