"""The refusals that the public ops share. Each names the argument, what came and what is wanted."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def check_dims(name: str, tensor: Tensor, layout: str) -> None:
    """The tensor has as many dimensions as the layout has letters, as in "B H N D"."""
    if tensor.dim() != len(layout.split()):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted ({layout})")


def check_shape(name: str, tensor: Tensor, *wanted: int) -> None:
    if tensor.shape != wanted:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {wanted}")


def check_dtype(name: str, tensor: Tensor, *wanted: torch.dtype) -> None:
    if tensor.dtype not in wanted:
        names = " or ".join(dict.fromkeys(str(dtype) for dtype in wanted))
        raise ValueError(f"{name} is {tensor.dtype}, wanted {names}")


def check_finite(name: str, value: float) -> None:
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, wanted a finite number")


def check_device(name: str, tensor: Tensor, wanted: torch.device) -> None:
    if tensor.device != wanted:
        raise ValueError(f"{name} is on {tensor.device}, wanted {wanted}")
