"""Which body runs each op on each device: registered here, and reported by `implementations`."""

from collections.abc import Callable
from typing import Any

import torch

_implementations: dict[str, dict[str, str]] = {}


def define_op(
    name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Register musiclm::name, with the reference as its body on CPU and, until a kernel exists,
    on CUDA too.

    Args:
        name: the op's name within `torch.ops.musiclm`.
        schema: arguments and results in PyTorch's schema language.
        reference: the body; called with the schema's arguments in order.
        fake: the shape rule, called in the same way.
    """
    qualified = f"musiclm::{name}"

    def body(*arguments: Any) -> Any:
        # Under autocast the matrix products of the body would be rounded, its sums with them.
        device = next(a.device.type for a in arguments if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return reference(*arguments)
        with torch.autocast(device, enabled=False):
            return reference(*arguments)

    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("CPU", "CUDA"), body)
    torch.library.register_fake(qualified, fake)
    _implementations[name] = {"cpu": "reference", "cuda": "reference"}
    return getattr(torch.ops.musiclm, name).default


def refuse_to_differentiate(name: str) -> None:
    """Make musiclm::name, a backward op, raise RuntimeError when it is differentiated itself."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"musiclm::{name} cannot be differentiated: its op is so only once")

    torch.library.register_autograd(f"musiclm::{name}", refuse)


def implementations() -> dict[str, dict[str, str]]:
    """What runs each op: {op: {"cpu": "reference", "cuda": "reference" or "triton"}}."""
    return {name: dict(bodies) for name, bodies in _implementations.items()}
