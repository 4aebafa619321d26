"""Every suite under pytest-benchmark: `python -m pytest benchmarks`."""

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.case import Case
from benchmarks.gpu import SUITES
from benchmarks.record import Recorder, Row
from benchmarks.replay import CLOCK, report
from benchmarks.run import run_case

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = 1.5 if DEVICE_TYPE == "cuda" else 3.0  # of timing, for each case


@cache
def rows_of(suite: str, case: Case, device: torch.device, recorder: Recorder) -> dict[str, Row]:
    """A case's rows by provider, written down once."""
    rows = run_case(SUITES[suite], case, device, budget_s=SECONDS)
    recorder.append(rows)
    return {row["provider"]: row for row in rows}


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("suite", "case", "provider"),
    [
        pytest.param(suite.name, case, provider.name, id=f"{case.op}: {case.name}: {provider.name}")
        for suite in SUITES.values()
        for case in suite.cases(DEVICE_TYPE)
        for provider in suite.providers
    ],
)
def test_case(
    suite: str,
    case: Case,
    provider: str,
    device: torch.device,
    recorder: Recorder,
    benchmark: Any,
) -> None:
    row = rows_of(suite, case, device, recorder)[provider]
    report(benchmark, row, is_ours=lambda name: name.startswith("ours"))
