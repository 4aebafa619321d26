"""pytest-benchmark's view of a case: a test for each provider, over times taken in turns.

pytest-benchmark times one call after the other by the host's clock. Here a case's providers are
checked and timed together, on the device's clock; each test then hands its samples over, by a clock
that advances by one sample whenever the benchmarked function is called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.record import TIMED

EXTRA = ("tflops", "share_of_floor", "floor_us", "peak_bytes", "share_of_budget", "method")


class ReplayClock:
    """A clock that stands still but for `step`."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._samples_s: list[float] = []

    def __call__(self) -> float:
        return self._now_s

    def load(self, samples_us: Sequence[float]) -> None:
        self._samples_s = [sample * 1e-6 for sample in reversed(samples_us)]

    def step(self) -> None:
        if self._samples_s:  # pytest-benchmark calls once more after the last round
            self._now_s += self._samples_s.pop()


CLOCK = ReplayClock()


def report(benchmark: Any, row: dict[str, Any], is_ours: Callable[[str], bool]) -> None:
    """Hand a row to the `benchmark` fixture; without a time, skip, or fail if it is our own."""
    if row["status"] != TIMED:
        message = f"{row['status']}: {row['reason']}"
        if is_ours(row["provider"]):
            pytest.fail(message)
        pytest.skip(message)
    benchmark.group, benchmark.name = f"{row['op']}: {row['case']}", row["provider"]
    benchmark.extra_info.update({name: row[name] for name in EXTRA})
    CLOCK.load(row["samples_us"])
    benchmark.pedantic(CLOCK.step, rounds=len(row["samples_us"]))
