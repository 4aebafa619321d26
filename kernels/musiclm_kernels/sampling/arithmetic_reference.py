"""Exponential and logarithm of the float rule: float32 additions and multiplications in a stated
order, each rounded by itself, so that every processor finds the same bits.

`tile.py` is the same in Triton. A fused multiply-add would round once where this rounds
twice. Coefficients: least relative error on the reduced range, by Lawson's iteration; each is a
float32.
"""

import torch
from torch import Tensor

LOG2_E = 1.4426950216293335
LN2_HIGH = 0.693359375  # ln 2 in ten bits, exact in a product with any exponent
LN2_LOW = -0.00021219444170128554  # the rest
# exp(r) = 1 + r + r * r * P(r), for |r| <= ln(2) / 2
EXP = (
    0.0013814467238262296,
    0.008368780836462975,
    0.04166839271783829,
    0.1666651964187622,
    0.4999999403953552,
)
# log(1 + f) = f - f * f / 2 + f * f * f * P(f), for 1 + f from sqrt(1/2) to sqrt(2)
LOG = (
    -0.07634492963552475,
    0.12761574983596802,
    -0.13160182535648346,
    0.14201758801937103,
    -0.16623356938362122,
    0.20001226663589478,
    -0.2500081956386566,
    0.3333333134651184,
)
SQRT_HALF_BITS = 0x3F3504F3
EXPONENT_SHIFT, EXPONENT_BIAS = 23, 127
MASS_BITS = 23  # the mass of the likeliest token is 2^23
LARGEST_TOTAL = 2**31  # what the mass of a row is under once it is fitted
MOST_SHIFT = 32  # of the mass of a row as long as memory can hold
NO_MASS = 30.0  # exp of less than minus this is under half a unit of mass
TOP_P_BITS = 24


def mass(deficits: Tensor) -> Tensor:
    """exp(-deficit): float64 for float64, else int64 in units of 2^-23, rounded.

    Args:
        deficits: 0 or more; +inf has no mass.
    """
    if deficits.dtype == torch.float64:
        return torch.exp(-deficits)
    x = deficits.clamp_max(NO_MASS)
    n = (x * LOG2_E + 0.5).to(torch.int32)
    halvings = n.to(torch.float32)
    r = (halvings * LN2_HIGH - x) + halvings * LN2_LOW
    scale = ((EXPONENT_BIAS + MASS_BITS - n) << EXPONENT_SHIFT).view(torch.float32)
    value = 1.0 + (r + r * r * _polynomial(r, EXP))
    return (value * scale + 0.5).to(torch.int64)


def fit(masses: Tensor) -> Tensor:
    """The integer masses of a row [B, V], halved until they add up to an int32: at V tokens that
    loses up to V * 2^-30 of their total."""
    if masses.dtype == torch.float64:
        return masses
    powers = torch.arange(MOST_SHIFT, device=masses.device)
    shift = masses.sum(-1, keepdim=True) >= (LARGEST_TOTAL << powers)
    return masses >> shift.sum(-1, keepdim=True)


def log(x: Tensor) -> Tensor:
    """The natural logarithm of positive, normal, finite numbers, in their dtype."""
    if x.dtype == torch.float64:
        return x.log()
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> EXPONENT_SHIFT
    f = (bits - (exponent << EXPONENT_SHIFT)).view(torch.float32) - 1.0
    doublings = exponent.to(torch.float32)
    square = f * f
    small = (f * square) * _polynomial(f, LOG)
    small = (small + doublings * LN2_LOW) - 0.5 * square
    return (f + small) + doublings * LN2_HIGH


def top_p_in_bits(top_p: float) -> int:
    """top_p in units of 2^-24, as the integer sums of mass compare with it; 1 at least."""
    return max(1, round(top_p * 2**TOP_P_BITS))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        value = value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])
