"""Which body runs each op on each device: registered here, and reported by `implementations`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

_implementations: dict[str, dict[str, str]] = {}
_kernels_on_cpu = ContextVar("kernels_on_cpu", default=False)


def define_op(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    kernel: str | None = None,
) -> torch._ops.OpOverload:
    """Register musiclm::name: a body in PyTorch for CPU; on CUDA the kernel, if there is one.

    A kernel takes no float64: with such an argument the body in PyTorch runs everywhere.

    Args:
        name: the op's name within `torch.ops.musiclm`.
        schema: arguments and results in PyTorch's schema language.
        reference: the body in PyTorch, the definition or a quicker way to the same; called with the schema's arguments in order.
        fake: the shape rule, called in the same way.
        kernel: "module:function" of the launcher, called in the same way and imported on its first
            call, so that nothing but a GPU's user needs Triton.
    """
    qualified = f"musiclm::{name}"

    def body(*arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        first, dtypes = tensors[0], {tensor.dtype for tensor in tensors}
        device = first.device.type
        interpreted = device == "cpu" and _kernels_on_cpu.get()
        # The interpreter multiplies bfloat16 as the integers of its bits.
        refused = {torch.float64, torch.bfloat16} if interpreted else {torch.float64}
        takes = dtypes.isdisjoint(refused)
        with _without_autocast(device):
            if kernel is not None and takes and (device == "cuda" or interpreted):
                with torch.cuda.device_of(first):  # Triton launches on the current device
                    return _load(kernel)(*arguments)
            if interpreted:
                raise RuntimeError(
                    f"through_kernels: no Triton kernel of musiclm::{name} runs on CPU in "
                    f"{', '.join(map(str, dtypes & refused)) or first.dtype}"
                )
            return reference(*arguments)

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("CPU", "CUDA"), body)
    torch.library.register_fake(qualified, fake)
    _implementations[name] = {"cpu": "reference", "cuda": "triton" if kernel else "reference"}
    return getattr(torch.ops.musiclm, name).default


def inlines_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a public function should run its body in PyTorch, and not the op.

    Of a decode step an op on a CPU takes microseconds, and what calls it through the dispatcher as
    long again: while a function of CPU tensors is being compiled, the compiler sees the body.
    """
    return torch.compiler.is_compiling() and tensor.device.type == "cpu"


def without_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """body as an op would run it: what `inlines_on_cpu` lets the compiler see, autocast does not."""

    def run(*arguments: Any, **options: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return body(*arguments, **options)

    return run


def refuse_to_differentiate(name: str) -> None:
    """Make musiclm::name, a backward op, raise RuntimeError when it is differentiated itself."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"musiclm::{name} cannot be differentiated: its op is so only once")

    torch.library.register_autograd(f"musiclm::{name}", refuse)


def implementations() -> dict[str, dict[str, str]]:
    """What runs each op: {op: {"cpu": "reference", "cuda": "reference" or "triton"}}."""
    return {name: dict(bodies) for name, bodies in _implementations.items()}


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Within: an op on CPU tensors runs its kernel, or raises RuntimeError where it has none."""
    token = _kernels_on_cpu.set(True)
    try:
        yield
    finally:
        _kernels_on_cpu.reset(token)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Under autocast the matrix products of a body would be rounded, its sums with them."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


def _load(kernel: str) -> Callable[..., Any]:
    module, function = kernel.split(":")
    return getattr(import_module(module), function)
