"""What both encoding kernels are made of: the scaled fp16 factors of a product, and the search of one
level for the codes nearest to a block of residuals. Dimensions as in encode.py.
"""

import triton
import triton.language as tl

TOP = tl.constexpr(14)  # scaled values reach 2^14 to 2^15, where fp16 has all its 11 bits
FP32_BIAS = tl.constexpr(127)
# Of a residual over its level: beyond it |c|^2 is below the last bit of r.c.
MAX_RATIO = tl.constexpr(80)


@triton.jit
def exponent(largest):
    """The power of two at or below a largest magnitude, within what can be scaled by."""
    biased = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.maximum(biased - FP32_BIAS, TOP - 126)


@triton.jit
def power_of_two(exponent):
    return ((exponent + FP32_BIAS) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """x as the sum of two fp16 numbers, the second below the last bit of the first."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def look_up(book_ptr, code, columns, mask, D: tl.constexpr):
    offsets = code[:, None] * D + columns[None, :]
    return tl.load(book_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _product_in_parts(
    own_high_ptr,  # [BLOCK_N, BLOCK_D] fp16
    own_low_ptr,
    high_ptr,  # [BLOCK_K, BLOCK_D] fp16
    low_ptr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] products of rows that are too wide to be multiplied at once."""
    columns = tl.arange(0, PART)
    own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + columns[None, :]
    book = tl.arange(0, BLOCK_K)[None, :] * BLOCK_D + columns[:, None]
    product = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    small = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for column in range(0, BLOCK_D, PART):
        high = tl.load(own_high_ptr + column + own)
        book_high = tl.load(high_ptr + column + book)
        product = tl.dot(high, book_high, product)
        if EXACT:
            small = tl.dot(tl.load(own_low_ptr + column + own), book_high, small)
            small = tl.dot(high, tl.load(low_ptr + column + book), small)
    return product + small


@triton.jit
def nearest(
    high,  # [BLOCK_N, BLOCK_D] fp16, the scaled residual
    low,
    own_high_ptr,  # the same in memory, where PART is less than BLOCK_D
    own_low_ptr,
    top,  # [BLOCK_N], its exponents
    largest_ptr,
    high_ptr,
    low_ptr,
    norms_ptr,
    level,
    padded_K,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART: tl.constexpr,
):
    """[BLOCK_N] int32: each residual's nearest code of a level, the lowest of equals."""
    tile = tl.arange(0, BLOCK_K)
    book = tile[None, :] * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    first = tl.cast(level, tl.int64) * padded_K
    # 2 r.c in the unit of the level's norms
    level_top = exponent(tl.load(largest_ptr + level).to(tl.float32))
    ratio = power_of_two(tl.maximum(tl.minimum(top - level_top + 1, MAX_RATIO), -126))

    nearest = tl.full((BLOCK_N, BLOCK_K), float("inf"), dtype=tl.float32)
    found = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.int32)
    for start in range(0, padded_K, BLOCK_K):
        if PART < BLOCK_D:
            product = _product_in_parts(
                own_high_ptr, own_low_ptr,
                high_ptr + (first + start) * BLOCK_D, low_ptr + (first + start) * BLOCK_D,
                EXACT, BLOCK_N, BLOCK_K, BLOCK_D, PART,
            )  # fmt: skip
        elif EXACT:  # the small terms first, so that they cost the sum no precision
            book_high = tl.load(high_ptr + (first + start) * BLOCK_D + book)
            product = tl.dot(low, book_high)
            book_low = tl.load(low_ptr + (first + start) * BLOCK_D + book)
            product = tl.dot(high, book_low, product)
            product = tl.dot(high, book_high, product)
        else:
            product = tl.dot(high, tl.load(high_ptr + (first + start) * BLOCK_D + book))
        norms = tl.load(norms_ptr + (first + start) + tile)
        distance = norms[None, :] - product * ratio[:, None]
        closer = distance < nearest
        nearest = tl.where(closer, distance, nearest)
        found = tl.where(closer, start, found)
    is_nearest = nearest == tl.min(nearest, axis=1)[:, None]
    return tl.min(tl.where(is_nearest, found + tile[None, :], padded_K), axis=1)


@triton.jit
def store_results(
    all_codes,  # [BLOCK_N, BLOCK_Q] int32
    codebooks_ptr,
    codes_ptr,  # of the program's first row
    quantized_ptr,
    num_rows,
    Q,
    K,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the codes, and the sum of what they stand for: made here, because the registers would
    not hold it beside the residual."""
    rows = tl.arange(0, BLOCK_N)
    levels = tl.arange(0, BLOCK_Q)
    has_code = (rows < num_rows)[:, None] & (levels < Q)[None, :]
    tl.store(codes_ptr + rows[:, None] * Q + levels[None, :], all_codes.to(tl.int64), has_code)
    for column in range(0, BLOCK_D, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        mask = (rows < num_rows)[:, None] & (columns < D)[None, :]
        quantized = tl.zeros((BLOCK_N, COLUMNS), dtype=tl.float32)
        for level in range(Q):
            code = tl.sum(tl.where((levels == level)[None, :], all_codes, 0), axis=1)
            level_ptr = codebooks_ptr + tl.cast(level, tl.int64) * K * D
            quantized += look_up(level_ptr, code, columns, mask, D)
        tl.store(quantized_ptr + (rows[:, None] * D + columns[None, :]), quantized, mask=mask)
