"""One CUDA graph: launches recorded once, then sent to the device all at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # kernels are compiled, and libraries take their workspaces, before the capture


class CudaGraph:
    """A function without arguments or results, replayed.

    Args:
        function: reads and writes tensors that stay where they are, and never waits for the device.
        state: of these tensors those that must be after the capture as they were before it: the
            function is called a few times first.
    """

    def __init__(self, function: Callable[[], None], *, state: Sequence[Tensor]) -> None:
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function()
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Records, and runs nothing. On its own stream: PyTorch's is of the device that captured first.
        # Other threads may go on: only this one's calls are recorded.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        self._graph.replay()
