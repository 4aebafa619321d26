"""Running the Triton kernels on CPU tensors, for tests and debugging."""

import os
from contextlib import AbstractContextManager

from musiclm_kernels.registry import implementations


def through_kernels() -> AbstractContextManager[None]:
    """A context in which the public ops run their Triton kernels in Triton's interpreter.

    Raises:
        RuntimeError: TRITON_INTERPRET is not set, or no op has a kernel. The second holds for
            every op of this version, so this always raises: nothing is passed off as a kernel.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "through_kernels needs Triton's interpreter: "
            "set TRITON_INTERPRET=1 before Triton is first imported"
        )
    names = ", ".join(sorted(implementations()))
    raise RuntimeError(f"through_kernels: no Triton kernel exists yet for any of {names}")
