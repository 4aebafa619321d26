"""Times of several calls that compute the same, taken in turns.

In turns, so that a machine that slows down slows all of them. On a GPU by events around each call,
after the L2 cache was overwritten; where the quickest call takes less than `GRAPH_BELOW_US`, all are
captured in CUDA graphs first, so that the device's time is measured and not the launches'.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.case import Call, Tensors

# A forward and backward pass is some ten launches and a walk through autograd: up to half a
# millisecond of Python, which a training step hides behind the kernels before it.
GRAPH_BELOW_US = 500.0
# Twice the largest L2 of the GPUs in roof.py (60 MB on an H200), in bytes.
FLUSH_BYTES = 128 * 2**20
MAX_ROUNDS = 200


@dataclass(frozen=True)
class Timing:
    """Of one call, in microseconds. `method` is "events", "graph" or "clock"."""

    samples_us: tuple[float, ...]
    method: str

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def low_us(self) -> float:
        """The 20th percentile."""
        return _quantile(self.samples_us, 0.2)

    @property
    def high_us(self) -> float:
        """The 80th percentile."""
        return _quantile(self.samples_us, 0.8)


def _quantile(samples: tuple[float, ...], share: float) -> float:
    ordered = sorted(samples)
    return ordered[round(share * (len(ordered) - 1))]


def measure(
    calls: dict[str, Call],
    device: torch.device,
    budget_s: float,
    is_right: Callable[[str, Tensors], bool],
) -> dict[str, Timing]:
    """Time all calls, one after the other, again and again.

    Args:
        calls: by name, each run at least once already (compiled, allocated).
        device: where they run.
        budget_s: about how long it may take; each call is timed three times at least.
        is_right: whether results are those of the call of this name. A graph is only used where
            its replay fills in the right ones.
    """
    if not calls:
        return {}
    if device.type == "cuda":
        return _measure_cuda(calls, budget_s, is_right)
    return _interleave(calls, _clock_us, budget_s, "clock")


def _interleave(
    calls: dict[str, Callable[[], Any]],
    timed_us: Callable[[Callable[[], Any]], float],
    budget_s: float,
    method: str,
) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        for name, call in calls.items():
            samples[name].append(timed_us(call))
        if round_ >= 2 and time.perf_counter() - started > budget_s:
            break
    return {name: Timing(tuple(taken), method) for name, taken in samples.items()}


def _clock_us(call: Callable[[], Any]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def _measure_cuda(
    calls: dict[str, Call], budget_s: float, is_right: Callable[[str, Tensors], bool]
) -> dict[str, Timing]:
    event_us = _event_timer()
    first = _interleave(calls, event_us, budget_s / 10, "events")
    if min(timing.median_us for timing in first.values()) >= GRAPH_BELOW_US:
        return _interleave(calls, event_us, budget_s, "events")
    replays: dict[str, Callable[[], None]] = {}
    refused: dict[str, Call] = {}  # their rows say "events"
    for name, call in calls.items():
        try:
            graph = captured(call)
        except RuntimeError:
            refused[name] = call
            continue
        if is_right(name, graph.replay_over_nan()):
            replays[name] = graph.replay
        else:
            refused[name] = call
    timings = _interleave(replays | refused, event_us, budget_s, "graph")
    return {
        name: Timing(timing.samples_us, "events" if name in refused else "graph")
        for name, timing in timings.items()
    }


def _event_timer() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def event_us(call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # also the head start that hides the launches of what follows
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    return event_us


@dataclass(frozen=True)
class Captured:
    """A call as a CUDA graph, and the tensors that each replay fills."""

    graph: torch.cuda.CUDAGraph
    results: Tensors

    def replay(self) -> None:
        self.graph.replay()

    def replay_over_nan(self) -> Tensors:
        """The results of one replay, NaN where it wrote nothing."""
        with torch.no_grad():
            for result in self.results.values():
                result.fill_(float("nan"))
        self.replay()
        return self.results


def captured(call: Call) -> Captured:
    """The call in a CUDA graph. Not on the default stream, which cannot be captured.

    Raises:
        RuntimeError: it does something that cannot be captured.
    """
    for _ in range(3):  # libraries set themselves up on a new stream's first calls
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = call()
    return Captured(graph, results)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that a call needs beyond what is there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
