"""What the attention kernels share: the scores of one tile of queries and keys.

Codes become words: the table's index of a pair is `query_word - key_word`, cut into the table. The
words are unsigned, so that codes of any size within +-2^30 subtract without overflow.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
CODE_SHIFT = tl.constexpr(1 << 30)
SCAN = tl.constexpr(512)  # codes looked at together


@triton.jit
def query_words(codes, offset, T):
    """uint32 words of queries: code + offset, shifted, and cut where every key gives the same end."""
    words = codes.to(tl.int64) + CODE_SHIFT + offset
    last = tl.cast(T, tl.int64) + CODE_SHIFT + CODE_SHIFT
    return tl.minimum(tl.maximum(words, 0), last).to(tl.uint32)


@triton.jit
def key_words(codes):
    """uint32 words of keys."""
    return (codes.to(tl.int64) + CODE_SHIFT).to(tl.uint32)


@triton.jit
def table_bias(table, query_word, key_word, T, CLAMP: tl.constexpr, GATHER: tl.constexpr):
    """[I, J] bias of the pairs of words [I, 1] and [1, J].

    GATHER reads a table that the program holds; otherwise `table` points to it. A load inside a
    pipelined loop would be staged through shared memory entry by entry; a gather is not.
    """
    if CLAMP:
        index = tl.minimum(tl.maximum(query_word, key_word) - key_word, tl.cast(T - 1, tl.uint32))
    else:
        index = query_word - key_word
    index = index.to(tl.int32, bitcast=True)
    if GATHER:
        bias = tl.reshape(tl.gather(table, tl.ravel(index), 0), index.shape)
    else:
        bias = tl.load(table + index) * LOG2_E
    return bias


@triton.jit
def keeps(seed_ptr, rate_31, row, column, batch_head):
    """Dropout's choice for each pair: Philox of (key, query, batch and head) under the seed."""
    which = tl.cast(batch_head, tl.int32)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), column, row, which, tl.zeros_like(which))
    return (word >> 1).to(tl.int32) >= rate_31


@triton.jit
def sees(row, column, N, M, key_mask_ptr, CAUSAL: tl.constexpr):
    """Whether the query `row` [I, 1] attends to the key `column` [1, J]."""
    visible = column < M
    if CAUSAL:
        visible = visible & (column <= row + (M - N))
    if key_mask_ptr is not None:
        visible = visible & (tl.load(key_mask_ptr + column, mask=column < M, other=0) != 0)
    return visible


@triton.jit
def code_range(code_ptr, count):
    """The smallest and the largest of `count` codes, as int64."""
    step = tl.arange(0, SCAN)
    lowest = tl.full([SCAN], CODE_SHIFT, tl.int32)
    highest = tl.full([SCAN], -CODE_SHIFT, tl.int32)
    for start in tl.range(0, count, SCAN):
        code = tl.load(code_ptr + tl.minimum(start + step, count - 1))
        lowest = tl.minimum(lowest, code)
        highest = tl.maximum(highest, code)
    return tl.min(lowest).to(tl.int64), tl.max(highest).to(tl.int64)


@triton.jit
def all_in_table(lowest_q, highest_q, lowest_k, highest_k, offset, T):
    """Whether no pair of codes within these ranges leaves the table."""
    return (lowest_q + offset - highest_k >= 0) & (highest_q + offset - lowest_k < T)


@triton.jit
def load_rows(
    ptr,
    stride,
    num_rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
):
    """[ROWS, BLOCK_D] from ptr on; zeros beyond num_rows (checked under MASK alone) and beyond D."""
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    if MASK and D != BLOCK_D:
        rows = tl.load(ptr + r * stride + d, mask=(r < num_rows) & (d < D), other=0.0)
    elif MASK:
        rows = tl.load(ptr + r * stride + d, mask=r < num_rows, other=0.0)
    elif D != BLOCK_D:
        rows = tl.load(ptr + r * stride + d, mask=d < D, other=0.0)
    else:
        rows = tl.load(ptr + r * stride + d)
    return rows
