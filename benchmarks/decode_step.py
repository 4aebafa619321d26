"""A whole decode step, from embedding to embedding, beside those of others.

    python -m benchmarks.decode_step [--threads 2] [--match ...] [--seconds 5] [--dry]

Each step takes in a token a row, runs all layers, mixes in the guidance and draws the next token.
The clock is the host's, around twenty steps. Weights are random (`decode_models.py`). Before it is
timed, a step must write the last layer's keys and values as the float64 definition says, within
twice what plain PyTorch errs in the same precision; peers of the same model must give its logits. A
compiled static cache and transformers' are compiled as ours is, with as many slots: one function of
model and draw, a graph on a GPU, the weights constants on a CPU; audiolm-pytorch's runs as its users
run it. `kl_nats` and `same_top_1` say what narrow weights do to the distribution of the next token.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.case import CannotRun
from benchmarks.decode_models import DIM_HEAD, VOCABULARY
from benchmarks.decode_providers import PROVIDERS
from benchmarks.decode_setup import MAX_STEPS, DecodeStepCase, Measured, Setup
from benchmarks.record import (
    ABOVE_ROOF,
    CANNOT_RUN,
    RIGHT,
    TIMED,
    WRONG,
    Recorder,
    Row,
    device_name,
    recorder_for,
)
from benchmarks.roof import above_roof, roof_of
from benchmarks.table import print_table

# Between two looks at the clock: a step finds in the caches what the one before it left there.
STEPS_AT_ONCE = 20


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second: of a GPU the measured copy of roof.py, of a CPU the best sum of 256 MiB."""
    roof = roof_of(device_name(device))
    if roof is not None:
        return roof.bytes_per_s
    large = torch.zeros(2**26, device=device)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        float(large.sum())
        seconds.append(time.perf_counter() - started)
    return large.nbytes / min(seconds)


def run_case(
    case: DecodeStepCase, device: torch.device, budget_s: float, only: set[str] | None
) -> list[Row]:
    torch._dynamo.reset()
    setup, bandwidth = Setup(case, device), read_bandwidth(device)
    rows: dict[str, Row] = {}
    measured: dict[str, Measured] = {}
    for name, build in PROVIDERS.items():
        if (only is not None and name not in only) or not _wanted(name, device):
            continue
        rows[name] = row = {**case.as_row(), "provider": name}
        try:
            built = build(setup)
        except Exception as error:  # noqa: BLE001 - someone else's code; the row says which
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            row |= {
                "status": CANNOT_RUN,
                "reason": str(error) if isinstance(error, CannotRun) else reason,
            }
            continue
        row |= built.agreement
        if not built.verdict.passed:
            row |= {"status": WRONG, "reason": built.verdict.failure}
            continue
        row |= {"status": RIGHT, "errors": built.verdict.as_row()}
        measured[name] = built
    for name, samples in _in_turns({n: m.step for n, m in measured.items()}, device, budget_s):
        floor = 1e6 * measured[name].num_bytes / bandwidth
        rows[name] |= _timed(case, measured[name], samples, floor, device)
    return list(rows.values())


def _wanted(name: str, device: torch.device) -> bool:
    return name != "ours float8" or device.type == "cuda"  # a CPU has no product for it


def _in_turns(
    steps: dict[str, Callable[[], object]], device: torch.device, budget_s: float
) -> Iterator[tuple[str, list[float]]]:
    """Microseconds of a step, by name."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    started = time.perf_counter()
    for round_ in range((MAX_STEPS - 8) // STEPS_AT_ONCE):
        for name, step in steps.items():
            samples[name].append(_clock_us(step, STEPS_AT_ONCE, device))
        if round_ >= 2 and time.perf_counter() - started > budget_s:
            break
    yield from samples.items()


def _clock_us(step: Callable[[], object], times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - started) / times


def _timed(
    case: DecodeStepCase, built: Measured, samples: list[float], floor: float, device: torch.device
) -> Row:
    median = statistics.median(samples)
    # A CPU's caches hold small weights: there the floor is no law.
    if device.type == "cuda" and (impossible := above_roof(median, floor)):
        return {"status": ABOVE_ROOF, "reason": impossible}
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {
        "status": TIMED,
        "method": "clock",
        "rounds": len(samples),
        "median_us": round(median, 3),
        "low_us": round(low, 3),
        "high_us": round(high, 3),
        "tokens_per_s": round(1e6 * case.batch / median, 1),
        "tflops": float(f"{_flops(case) / median / 1e6:.4g}"),
        "floor_us": round(floor, 3),
        "share_of_floor": round(floor / median, 4),
        # Without errors there is nothing that it could be compared with: its row says what it is.
        "share_of_budget": round(built.verdict.share_of_budget, 3) if built.verdict.errors else 0.0,
        "peak_bytes": None,
    }


def _flops(case: DecodeStepCase) -> float:
    """Of the products, two a weight and row."""
    inner = case.heads * DIM_HEAD
    if case.model == "audiolm":
        layer = case.dim * (4 * inner + 2 * DIM_HEAD + 3 * int(case.dim * 8 / 3))
    else:
        layer = case.dim * (4 * inner + 12 * case.dim)
    return 2.0 * case.rows * (case.depth * layer + VOCABULARY * case.dim)


def cases(device_type: str) -> list[DecodeStepCase]:
    case = partial(DecodeStepCase, dtype="bfloat16")
    if device_type == "cpu":
        small = partial(case, model="audiolm", dim=512, depth=6, heads=8, guidance=3.0)
        return [
            *(small(batch=batch, context=context) for context in (250, 1000) for batch in (1, 8)),
            case(model="paper", dim=512, depth=6, heads=8, batch=1, context=250),
        ]
    large = partial(case, dim=1024, depth=24, heads=16)
    return [
        *(
            large(model="paper", batch=batch, context=context)
            for batch in (1, 2, 8, 16)
            for context in (256, 1024)
        ),
        *(large(model="audiolm", batch=batch, context=1000, guidance=3.0) for batch in (1, 8)),
    ]


def run(
    device: torch.device,
    recorder: Recorder | None,
    *,
    budget_s: float,
    deadline: float = float("inf"),
    match: str = "",
    only: set[str] | None = None,
) -> int:
    """Run, print and write down all cases; how many of our results were wrong or impossible.

    Args:
        deadline: on `time.monotonic`'s clock; no case starts after it.
    """
    num_bad = 0
    for case in cases(device.type):
        if match not in case.name:
            continue
        if time.monotonic() > deadline:
            print(f"decode_step: no time left for {case.name} and what follows", flush=True)
            break
        rows = run_case(case, device, budget_s, only)
        if recorder is not None:
            recorder.append(rows)
        print_table(rows, "ours")
        for row in rows:
            if "tokens_per_s" in row:
                print(f"  {row['provider']}: {row['tokens_per_s']} tokens/s", flush=True)
        num_bad += sum(row["status"] in (WRONG, ABOVE_ROOF) for row in rows)
    return num_bad


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole decode step, beside those of others")
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
    only = set(options.providers.split(",")) if options.providers else None
    num_bad = run(
        device, None if options.dry else recorder_for(device),
        budget_s=options.seconds, match=options.match, only=only,
    )  # fmt: skip
    raise SystemExit(num_bad > 0)


if __name__ == "__main__":
    main()
