"""Weights in 8 bits."""

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, check_dims, check_dtype

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits with one scale for each output channel:

        scale[n] = max_k |weight[n, k]| / 127 (int8) or / 448 (float8_e4m3fn); 1 for a row of zeros
        weight8[n, k] = weight[n, k] / scale[n], rounded to the nearest, ties to even

    Args:
        weight: [N, K], any float dtype, finite.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        weight8 [N, K] in dtype, and scale [N] float32. int8 holds -127 to 127. In float32, or
        float64 for float64 weights.

    Raises:
        ValueError: weight's shape or type, or dtype, is not as above.
    """
    check_dims("weight", weight, "N K")
    check_dtype("weight", weight, *FLOATS)
    if dtype not in LARGEST:
        raise ValueError(f"dtype is {dtype}, wanted {' or '.join(map(str, LARGEST))}")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    largest = LARGEST[dtype]
    peaks = wide.abs().amax(1) if weight.shape[1] else wide.new_zeros(len(weight))
    # Rounded to float32 before it divides: the scale that is returned is the one that was used.
    scale = (peaks / largest).float()
    scale = torch.where(scale > 0, scale, 1.0)
    steps = (wide / scale[:, None].to(wide.dtype)).clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scale
