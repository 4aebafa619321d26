"""Drawing a token from a tile of scores in Triton, by the float rule (docs/kernels/sampling.md).

What `arithmetic_reference.py` and `reference.py` do in PyTorch, bit for bit. Kernels that use it are launched
with enable_fp_fusion=False. A tile is [ROWS, V]; no row's result depends on the others.
"""

import triton
import triton.language as tl

from musiclm_kernels.philox import UNIFORM_SCALE as _UNIFORM_SCALE
from musiclm_kernels.sampling import arithmetic_reference as arithmetic
from musiclm_kernels.sampling.reference import SMALLEST_UNIFORM as _SMALLEST_UNIFORM

LOG2_E = tl.constexpr(arithmetic.LOG2_E)
LN2_HIGH = tl.constexpr(arithmetic.LN2_HIGH)
LN2_LOW = tl.constexpr(arithmetic.LN2_LOW)
EXP = tl.constexpr(arithmetic.EXP)
LOG = tl.constexpr(arithmetic.LOG)
NUM_EXP, NUM_LOG = tl.constexpr(len(arithmetic.EXP)), tl.constexpr(len(arithmetic.LOG))
SQRT_HALF_BITS = tl.constexpr(arithmetic.SQRT_HALF_BITS)
EXPONENT_SHIFT = tl.constexpr(arithmetic.EXPONENT_SHIFT)
ONE_EXPONENT = tl.constexpr(arithmetic.EXPONENT_BIAS + arithmetic.MASS_BITS)  # of one, in mass
NO_MASS = tl.constexpr(arithmetic.NO_MASS)
TOP_P_BITS = tl.constexpr(arithmetic.TOP_P_BITS)
TOP_P_MASK = tl.constexpr((1 << arithmetic.TOP_P_BITS) - 1)
UNIFORM_SCALE = tl.constexpr(_UNIFORM_SCALE)
SMALLEST_UNIFORM = tl.constexpr(_SMALLEST_UNIFORM)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
INFINITY_BITS = tl.constexpr(0x7F800000)
LARGEST_TOTAL = tl.constexpr(arithmetic.LARGEST_TOTAL)
MOST_SHIFT = tl.constexpr(arithmetic.MASS_BITS + 15 - 31)  # of the mass of 16384 tokens
MOST_PAIRED = tl.constexpr(8192)  # tokens; the pairs of more spill
# Deficits from which on halving their bits is quicker: near zero, and among those that a large
# negative number in place of -inf has spread.
NEXT_TO_NOTHING, FAR_OFF = tl.constexpr(2.0**-10), tl.constexpr(64.0)


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr, NUM: tl.constexpr):
    value = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, NUM):
        value = value * x + COEFFICIENTS[i]
    return value


@triton.jit
def mass(deficit):
    """exp(-deficit) as int32 in units of 2^-23."""
    x = tl.minimum(deficit, NO_MASS)
    n = (x * LOG2_E + 0.5).to(tl.int32)
    halvings = n.to(tl.float32)
    r = (halvings * LN2_HIGH - x) + halvings * LN2_LOW
    scale = ((-n + ONE_EXPONENT) << EXPONENT_SHIFT).to(tl.float32, bitcast=True)
    value = 1.0 + (r + r * r * _polynomial(r, EXP, NUM_EXP))
    return (value * scale + 0.5).to(tl.int32)


@triton.jit
def fit(mass):
    """[ROWS, V]: halved until a row adds up to an int32."""
    total = tl.sum(mass.to(tl.int64), 1)
    shift = tl.zeros(total.shape, tl.int32)
    for bits in tl.static_range(MOST_SHIFT):
        shift += (total >= (LARGEST_TOTAL << bits)).to(tl.int32)
    return mass >> shift[:, None]


@triton.jit
def log(x):
    """The natural logarithm of positive, normal, finite numbers."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> EXPONENT_SHIFT
    f = (bits - (exponent << EXPONENT_SHIFT)).to(tl.float32, bitcast=True) - 1.0
    doublings = exponent.to(tl.float32)
    square = f * f
    small = (f * square) * _polynomial(f, LOG, NUM_LOG)
    small = (small + doublings * LN2_LOW) - 0.5 * square
    return (f + small) + doublings * LN2_HIGH


@triton.jit
def minus_noise(seed, position):
    """log(-log u) of the uniform draw at `position`, int64, of `seed`."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.zeros_like(low)
    high = zero + (position >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    folded = word.to(tl.int32, bitcast=True)
    folded = tl.where(folded < 0, -1 - folded, folded)
    u = tl.maximum(folded.to(tl.float32) * UNIFORM_SCALE, SMALLEST_UNIFORM)
    return log(-log(u))


@triton.jit
def guide(scores, unconditional, scale):
    guided = unconditional + scale * (scores - unconditional)
    return tl.where(scores == float("-inf"), scores, guided)


@triton.jit
def _between(low, high):
    """A key above `low` and below `high`: half way between the deficits, as they lie evenly; half
    way between the bits where both are next to nothing, as zero is far away there, or `high` far off."""
    lowest = tl.maximum(low, 0).to(tl.float32, bitcast=True)
    highest = high.to(tl.float32, bitcast=True)
    middle = (lowest + 0.5 * (highest - lowest)).to(tl.int32, bitcast=True)
    by_bits = (highest < NEXT_TO_NOTHING) | (highest > FAR_OFF)
    middle = tl.where(by_bits, low + ((high - low) >> 1), middle)
    return tl.maximum(tl.minimum(middle, high - 1), low + 1)


@triton.jit
def _kth_limit(keys, k, high):
    """[ROWS]: a key, up to which lie the k likeliest tokens and those that equal the last of them;
    `high` if there are fewer up to there.

    Halves the range of deficits until k tokens are in it: some nine turns. The way there decides
    nothing.
    """
    low = tl.full(high.shape, -1, tl.int32)
    num_high = tl.sum((keys <= high[:, None]).to(tl.int32), 1)
    while tl.max(tl.where(high - low > 1, num_high, 0), 0) > k:
        middle = _between(low, high)
        count = tl.sum((keys <= middle[:, None]).to(tl.int32), 1)
        reaches = count >= k
        high = tl.where(reaches, middle, high)
        num_high = tl.where(reaches, count, num_high)
        low = tl.where(reaches, low, middle)
    return high


@triton.jit
def _nucleus_limit(keys, mass, top_p, high):
    """[ROWS]: a key, up to which lie the fewest of the likeliest tokens whose mass reaches top_p of
    the mass up to `high`, and those that equal the last of them."""
    mass = fit(tl.where(keys <= high[:, None], mass, 0))
    num_high, total = _count_and_sum(keys, mass, high)
    wanted = ((total.to(tl.int64) * top_p + TOP_P_MASK) >> TOP_P_BITS).to(tl.int32)
    low = tl.full(high.shape, -1, tl.int32)
    num_low = tl.full(high.shape, 0, tl.int32)
    while tl.max(tl.where(high - low > 1, num_high - num_low, 0), 0) > 1:
        middle = _between(low, high)
        count, total = _count_and_sum(keys, mass, middle)
        reaches = total >= wanted
        high = tl.where(reaches, middle, high)
        num_high = tl.where(reaches, count, num_high)
        low = tl.where(reaches, low, middle)
        num_low = tl.where(reaches, num_low, count)
    return high


@triton.jit
def _count_and_sum(keys, mass, limit):
    """[ROWS] each: how many keys are up to the limit, and their mass."""
    if keys.shape[1] <= MOST_PAIRED:
        # One sum over [ROWS, 2, V]: half the barriers of two.
        second = (tl.arange(0, 2) == 1)[None, :]
        kept = keys[:, None, :] <= limit[:, None, None]
        sums = tl.sum(tl.where(kept, tl.where(second[:, :, None], mass[:, None, :], 1), 0), 2)
        count = tl.sum(tl.where(second, 0, sums), 1)
        total = tl.sum(tl.where(second, sums, 0), 1)
    else:
        kept = keys <= limit[:, None]
        count = tl.sum(kept.to(tl.int32), 1)
        total = tl.sum(tl.where(kept, mass, 0), 1)
    return count, total


@triton.jit
def draw(
    scores,  # [ROWS, V]; -inf where no token may be drawn
    minus_noise,  # [ROWS, V]
    inverse_temperature,
    top_k,
    top_p,  # in units of 2^-TOP_P_BITS
    largest_deficit,  # that min_p allows
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
):
    """[ROWS] int32: the column of the least deficit less noise among those that are kept."""
    scores = tl.minimum(scores, LARGEST_FLOAT)
    peak = tl.maximum(tl.max(scores, 1), -LARGEST_FLOAT)
    deficit = tl.abs(peak[:, None] - scores) * inverse_temperature
    keys = deficit.to(tl.int32, bitcast=True)  # in the order of the deficits: none is negative
    cost = minus_noise + deficit
    if TOP_K or TOP_P:
        # The highest of a token that may be drawn; 0 is a token's if any may.
        limit = tl.max(tl.where(keys < INFINITY_BITS, keys, 0), 1)
        if TOP_K:
            limit = _kth_limit(keys, top_k, limit)
        if TOP_P:
            limit = _nucleus_limit(keys, mass(deficit), top_p, limit)
        cost = tl.where(keys <= limit[:, None], cost, float("inf"))
    if MIN_P:
        cost = tl.where(deficit <= largest_deficit, cost, float("inf"))
    return tl.argmin(cost, 1)
