"""What the GPU that a tensor lies on can do, as launchers ask for it. Imports Triton."""

import torch
import triton
from torch import Tensor

FIRST_WITH_FLOAT8 = 89  # compute capability times ten
FIRST_WITH_DEPENDENT_LAUNCH = 90


def compute_capability(tensor: Tensor) -> int:
    """Times ten; Hopper's in the interpreter, which has none."""
    if tensor.device.type == "cpu":
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def dependent_launch(tensor: Tensor) -> dict[str, bool]:
    """The arguments that let a kernel start while the one before it ends, where the GPU can."""
    has_it = compute_capability(tensor) >= FIRST_WITH_DEPENDENT_LAUNCH
    if tensor.device.type == "cpu" or not has_it:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def check_float8(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a float8 tensor on a GPU that knows no such numbers."""
    arch = compute_capability(tensor)
    if tensor.dtype == torch.float8_e4m3fn and arch < FIRST_WITH_FLOAT8:
        raise ValueError(
            f"{name} is {tensor.dtype} on a GPU of compute capability {arch / 10}, wanted a GPU "
            f"from {FIRST_WITH_FLOAT8 / 10} on"
        )
