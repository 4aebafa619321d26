"""The memory layout of what an op returns."""

import torch
from torch import Tensor


def empty_rows_like(x: Tensor) -> Tensor:
    """Uninitialised, of the shape and type of x [..., D] and in its layout, without its gaps; packed
    where the rows of x themselves are not.

    So queries that are a view of a projection [B, N, H, D] give an output of which [B, N, H * D] is
    a view, and gradients that go back into the projection's matrix product uncopied.
    """
    y = torch.empty_like(x)
    rows_are_packed = y.stride(-1) == 1 or y.shape[-1] == 1
    return y if rows_are_packed else torch.empty(x.shape, dtype=x.dtype, device=x.device)
