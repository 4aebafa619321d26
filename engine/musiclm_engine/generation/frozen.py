"""A function of weights and buffers, compiled for a CPU with the weights as its constants.

A product of few rows is the time it takes to read its weights. Constants are laid out anew in the
order in which oneDNN's products read them: 25 GB/s instead of 12 at 2 rows of bfloat16, one thread
of an AMD EPYC with AVX-512. The price is a second copy of the weights.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# glibc gives large blocks back to the system as they are freed, and each page of the next one has to
# be faulted in again: ten times what some kernels take. Once a block of up to 32 MiB was freed, it
# keeps those up to that size.
KEPT_BLOCK_BYTES = 30 * 2**20


class Frozen:
    """function(weights, *buffers), compiled at the first call, which is to be in inference mode or
    without gradients. Weights that change later are not seen, and nothing is looked at again: buffers
    stay of the first ones' types and shapes, but for dimensions that are marked dynamic. What was
    compiled, the copies of the weights with it, is kept by PyTorch as long as the process lives.

    Args:
        function: of weights and then tensors, or tuples of them; returns nothing.
        weights: a tensor, or dataclasses and tuples of them.
    """

    def __init__(self, function: Callable[..., None], weights: Any) -> None:
        # Dynamo keeps what it compiles by code object. With one of its own a function's compilation
        # is the only one that can be found, and its hundreds of guards on weights that nobody
        # changes need not be looked at: at 6 layers they took as long as a third of the products.
        code = _Constants.forward.__code__.replace()
        own = {"forward": FunctionType(code, _Constants.forward.__globals__)}
        module = type("_OwnConstants", (_Constants,), own)(function, weights)
        self._compiled = torch.compile(
            module.eval(),
            fullgraph=True,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        self._is_compiled = False
        torch.empty(KEPT_BLOCK_BYTES, dtype=torch.uint8)  # freed at once

    def __call__(self, *buffers: Any) -> None:
        if self._is_compiled:
            self._compiled(*buffers)
            return
        from torch._functorch import config as autograd
        from torch._inductor import config as inductor  # takes a second to import

        # Both caches of compiled graphs find one again by its operations, whatever the constants: a
        # number that was computed from other weights would stand in it.
        fresh: dict[str, Any] = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
        uncached = autograd.patch(enable_autograd_cache=False)
        # An option of torch.compile would come too late for freezing.
        with uncached, inductor.patch(freezing=True, **fresh):
            self._compiled(*buffers)
        self._is_compiled = True


class _Constants(nn.Module):
    """The weights as buffers of a module, which is what the compiler takes for constants."""

    def __init__(self, function: Callable[..., None], weights: Any) -> None:
        super().__init__()
        self._function = function
        self._num_weights = 0
        self._weights = self._rebuilt_by(weights)

    def forward(self, *buffers: Any) -> None:
        self._function(self._weights(), *buffers)

    def _rebuilt_by(self, node: Any) -> Callable[[], Any]:
        """What puts `node` together again of this module's buffers."""
        if isinstance(node, Tensor):
            name = f"weight{self._num_weights}"
            self._num_weights += 1
            self.register_buffer(name, node.detach())
            return lambda: getattr(self, name)
        if is_dataclass(node):
            kind: Any = type(node)
            named = {f.name: self._rebuilt_by(getattr(node, f.name)) for f in fields(node)}
            return lambda: kind(**{name: part() for name, part in named.items()})
        if isinstance(node, tuple):
            kind = type(node)
            parts = [self._rebuilt_by(part) for part in node]
            if kind is tuple:
                return lambda: tuple([part() for part in parts])
            return lambda: kind(*[part() for part in parts])
        return lambda: node
