"""Running the Triton kernels on CPU tensors, for tests and debugging."""

import os
from contextlib import AbstractContextManager

from musiclm_kernels.registry import kernels_on_cpu


def through_kernels() -> AbstractContextManager[None]:
    """A context in which the public ops run their Triton kernels in Triton's interpreter, forward
    and backward, on CPU tensors. Thousands of times slower than the definition.

    Within it, an op without a kernel, a float64 input (no kernel takes it) and a bfloat16 one (the
    interpreter multiplies its bit patterns) raise RuntimeError: nothing passes for a kernel.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set when Triton was first imported, or Triton is
            not installed.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "through_kernels needs Triton's interpreter: "
            "set TRITON_INTERPRET=1 before Triton is first imported"
        )
    try:
        from triton.language import cdiv
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError as error:
        raise RuntimeError(f"through_kernels needs Triton: {error}") from error
    # Triton's own library is decorated on its first import, and shows what was chosen then.
    interpreted = isinstance(cdiv, InterpretedFunction)
    if not interpreted:
        raise RuntimeError(
            "through_kernels: Triton was imported before TRITON_INTERPRET=1 was set; set it first"
        )
    return kernels_on_cpu()
