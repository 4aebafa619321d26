"""A variant: one launch that we ship, where it runs, and what must hold of its machine code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

ARCHITECTURES = (80, 90, 100)

# The opcode that a `tl.dot` becomes: the fastest that each architecture has, which wants tiles of 64
# rows or more; and mma.sync, which serves smaller ones.
ASYNCHRONOUS_DOTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
WARP_DOTS = {80: "HMMA", 90: "HMMA", 100: "HMMA"}


@dataclass(frozen=True)
class Promises:
    """What holds for every kernel that a variant launches.

    Attributes:
        tensor_cores: per architecture, the one opcode that all `tl.dot` must have become: no other
            tensor-core opcode and no scalar arithmetic in its place, and one kernel at least has it.
            Nothing is promised for an architecture that is not named.
        no_float_atomics: no sum depends on the order in which programs finish.
        no_async_gathers: no table of fp32 is staged through shared memory entry by entry (for
            kernels whose other inputs are narrower).
        no_fused_adds: every fp32 multiplication and addition rounds by itself, as it does elsewhere.
        prefetches: from sm_90 on it is launched while the kernel before it runs: it waits for that
            kernel, and loads something before it does.
        max_spill_bytes: local memory a thread may use.
    """

    tensor_cores: Mapping[int, str] | None = None
    no_float_atomics: bool = False
    no_async_gathers: bool = False
    no_fused_adds: bool = False
    prefetches: bool = False
    max_spill_bytes: int = 0


@dataclass(frozen=True)
class Variant:
    """A launch: what is compiled, for what, and what is promised of it.

    Attributes:
        name: unique among the variants; the key of its budget.
        launch: calls a launcher on tensors of the device "meta", in the shapes and types of use:
            Triton compiles for what divides by 16 and for what equals 1 in them.
        promises: checked on each kernel that was launched.
        archs: compute capabilities it ships for, as 90 for sm_90.
    """

    name: str
    launch: Callable[[], object]
    promises: Promises = field(default=Promises())
    archs: tuple[int, ...] = ARCHITECTURES


meta = partial(torch.empty, device="meta")
SUMS_IN_ORDER = Promises(no_float_atomics=True)
DOTS = Promises(tensor_cores=ASYNCHRONOUS_DOTS, no_float_atomics=True, no_async_gathers=True)
