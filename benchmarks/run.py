"""Runs the cases of a suite: build, check, time, check again, write down.

A row has a time only if the provider's results passed the gate on the same inputs, before the
timing and after it, and if the time is possible on the device.
"""

import argparse
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.case import C, Call, CannotRun, Provider, Suite, Tensors, to_float64
from benchmarks.gate import Verdict, judge
from benchmarks.nvml import gpu_state
from benchmarks.record import (
    ABOVE_ROOF,
    CANNOT_RUN,
    FAILED,
    RIGHT,
    TIMED,
    WRONG,
    Recorder,
    Row,
    device_name,
    recorder_for,
)
from benchmarks.roof import Roof, above_roof, floor_us, roof_of
from benchmarks.table import print_table
from benchmarks.timing import Timing, measure, peak_bytes


class DeviceLost(Exception):
    """A kernel broke the CUDA context: nothing else runs in this process."""


def run_case(
    suite: Suite[C],
    case: C,
    device: torch.device,
    *,
    budget_s: float,
    only: Iterable[str] | None = None,
) -> list[Row]:
    """The rows of a case, one for each provider.

    Args:
        budget_s: about how long the timing of all providers together may take.
        only: the names of the providers to run; None is all of them.

    Raises:
        DeviceLost: a provider broke the device; its case has no rows.
    """
    torch._dynamo.reset()  # each case compiles for its own shapes, within dynamo's limit of kinds
    with _stream_of_its_own(device):
        return _run_case(suite, case, device, budget_s, only)


def _stream_of_its_own(device: torch.device) -> AbstractContextManager[object]:
    """Autograd runs backward on the stream of the forward pass, and the default one cannot be
    captured in a graph."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def _run_case(
    suite: Suite[C], case: C, device: torch.device, budget_s: float, only: Iterable[str] | None
) -> list[Row]:
    inputs = suite.make_inputs(case, device)
    judges: dict[C, _Judge] = {}
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    answered: dict[str, C] = {}
    for provider in suite.providers:
        if only is not None and provider.name not in only:
            continue
        answers = provider.answers(case)
        if answers not in judges:
            judges[answers] = _Judge(suite, answers, inputs)
        rows[provider.name] = row = _first_row(provider, case, answers)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                call = provider.build(answers, inputs)
                verdict = judges[answers](call())
            except Exception as error:  # noqa: BLE001 - someone else's code; the row says which
                row |= {"status": CANNOT_RUN, "reason": _reason(error, warned)}
                continue
        row |= _gate_row(verdict)
        if verdict.passed:
            calls[provider.name], answered[provider.name] = call, answers

    before, load = gpu_state(device), os.getloadavg()[0]
    timings = measure(
        calls, device, budget_s, lambda name, results: judges[answered[name]](results).passed
    )
    machine = {"gpu_before": before, "gpu_after": gpu_state(device), "load_average": load}
    roof = roof_of(device_name(device))
    for name, timing in timings.items():
        again = judges[answered[name]](calls[name]())
        if again.passed:
            rows[name] |= timed_row(again, answered[name], timing, roof) | machine
            rows[name]["peak_bytes"] = peak_bytes(calls[name], device)
        else:
            rows[name] |= {"status": WRONG, "reason": f"right once, then: {again.failure}"}
    return list(rows.values())


class _Judge:
    """The gate of one case: the truth and the yardstick, computed once."""

    def __init__(self, suite: Suite[C], case: C, inputs: Tensors):
        self._truth = suite.plain(case, to_float64(inputs))
        self._yardstick = suite.plain(case, inputs)

    def __call__(self, results: Tensors) -> Verdict:
        return judge(results, self._truth, self._yardstick)


def _first_row(provider: Provider[C], case: C, answers: C) -> Row:
    row = {**case.as_row(), "provider": provider.name}
    return row if answers == case else {**row, "answers": answers.name}


def _gate_row(verdict: Verdict) -> Row:
    if not verdict.passed:
        return {"status": WRONG, "reason": verdict.failure}
    return {"errors": verdict.as_row(), "share_of_budget": round(verdict.share_of_budget, 3)}


def timed_row(verdict: Verdict, case: C, timing: Timing, roof: Roof | None) -> Row:
    """What a row says of a time, or why it cannot be true.

    Raises:
        ValueError: the gate did not pass.
    """
    if not verdict.passed:
        raise ValueError(f"no time without a passed gate: {verdict.failure}")
    floor = floor_us(case, roof)
    impossible = above_roof(timing.median_us, floor)
    if impossible:
        return {"status": ABOVE_ROOF, "reason": impossible}
    return {
        "status": TIMED,
        "method": timing.method,
        "rounds": len(timing.samples_us),
        "samples_us": [round(sample, 3) for sample in timing.samples_us],
        "median_us": round(timing.median_us, 3),
        "low_us": round(timing.low_us, 3),
        "high_us": round(timing.high_us, 3),
        "tflops": float(f"{case.work().flops / timing.median_us / 1e6:.4g}"),
        "floor_us": round(floor, 3) if floor else None,
        "share_of_floor": round(floor / timing.median_us, 4) if floor else None,
    }


def _reason(error: Exception, warned: list[warnings.WarningMessage]) -> str:
    """Why a provider does not run, in a line, with what it said before.

    Raises:
        DeviceLost: the error has taken the device with it.
    """
    if isinstance(error, CannotRun):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of device memory"
    if any(sign in str(error) for sign in ("illegal memory access", "unspecified launch failure")):
        raise DeviceLost(str(error)) from error
    # PyTorch tells in warnings why it finds none of its attention kernels fit.
    said = dict.fromkeys(
        " ".join(str(warning.message).split())[:200]
        for warning in warned
        if warning.category is UserWarning
    )
    message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return "; ".join([message, *list(said)[-2:]])


def run_suite(
    suite: Suite[C],
    device: torch.device,
    recorder: Recorder | None,
    *,
    budget_s: float,
    deadline: float = float("inf"),
    match: str = "",
    only: Iterable[str] | None = None,
) -> int:
    """Run and print a suite's cases, writing each down as it ends.

    Args:
        deadline: on `time.monotonic`'s clock; no case starts after it.
        match: only the cases with this in their names.

    Returns:
        How many of its own results were wrong or impossible.
    """
    num_bad = 0
    for case in suite.cases(device.type):
        if match not in case.name:
            continue
        if time.monotonic() > deadline:
            print(f"{suite.name}: no time left for {case.name} and what follows", flush=True)
            break
        rows = run_case(suite, case, device, budget_s=budget_s, only=only)
        if recorder is not None:
            recorder.append(rows)
        print_table(rows, suite.baseline)
        num_bad += sum(row["status"] in (WRONG, ABOVE_ROOF) for row in rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return num_bad


def check_suite(
    suite: Suite[C],
    device: torch.device,
    recorder: Recorder | None,
    deadline: float = float("inf"),
) -> int:
    """Pass our results of a suite's `checks` through the gate, untimed, writing each down.

    Args:
        deadline: on `time.monotonic`'s clock; no check starts after it.

    Returns:
        How many were not right.
    """
    ours = suite.providers[0]
    num_right = num_bad = 0
    for case in suite.checks():
        if time.monotonic() > deadline:
            print(f"{suite.name}: no time left for {case.name} and what follows", flush=True)
            break
        row = _check(suite, case, ours, device)
        if recorder is not None:
            recorder.append([row])
        if row["status"] == RIGHT:
            num_right += 1
        else:
            num_bad += 1
            print(f"{row['case']}: {row['status']}: {row['reason']}", flush=True)
    print(f"{suite.name}: {num_right} right, {num_bad} not", flush=True)
    return num_bad


def _check(suite: Suite[C], case: C, ours: Provider[C], device: torch.device) -> Row:
    inputs = suite.make_inputs(case, device)
    row = {**_first_row(ours, case, case), "op": "correctness"}
    try:
        verdict = _Judge(suite, case, inputs)(ours.build(case, inputs)())
    except Exception as error:  # noqa: BLE001 - the row says which; the next check may be right
        return {**row, "status": FAILED, "reason": _reason(error, [])}
    if not verdict.passed:
        return {**row, "status": WRONG, "reason": verdict.failure}
    return {**row, "status": RIGHT, "errors": verdict.as_row()}


def main(suites: Sequence[Suite[Any]], description: str) -> None:
    """The command line of a suite's module."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--match", default="", help="only cases with this in their names")
    parser.add_argument("--providers", help="comma-separated names; all if left out")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, for each case")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    recorder = None if options.dry else recorder_for(device)
    only = options.providers.split(",") if options.providers else None
    num_bad = sum(
        run_suite(suite, device, recorder, budget_s=options.seconds, match=options.match, only=only)
        for suite in suites
    )
    if recorder is not None:
        print(f"written to {recorder.path.name}")
    raise SystemExit(num_bad > 0)
