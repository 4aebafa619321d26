"""One GPU session: `python -m benchmarks.gpu --minutes 9`.

First what the device can do at best, then whether our kernels are right, then the suites. All is
written as it comes, so a session that is cut off has lost the case in hand.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    ast_block,
    attention,
    contrastive,
    correctness,
    decode_attention,
    decode_layer,
    decode_step,
    patch_front,
    rvq,
    sampling,
)
from benchmarks.case import Suite
from benchmarks.record import RESULTS, Recorder, Row, recorder_for
from benchmarks.run import DeviceLost, check_suite, run_suite
from benchmarks.timing import measure

SUITES: dict[str, Suite[Any]] = {
    suite.name: suite
    for suite in (
        attention.SUITE,
        ast_block.SUITE,
        patch_front.SUITE,
        rvq.SUITE,
        contrastive.SUITE,
        decode_attention.SUITE,
        decode_layer.SUITE,
        sampling.SUITE,
    )
}
STEPS = ("ceilings", "correctness", *SUITES, "decode_step")


def ceilings(device: torch.device) -> list[Row]:
    """What a large copy and a large matrix product reach: compare with roof.py."""
    source = torch.randn(2**29, device=device)  # 2 GiB
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = {
        "copy of 2 GiB": lambda: {"out": target.copy_(source)},
        "8192^3 product, bfloat16": lambda: {"out": a @ b},
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        times = measure(calls, device, 1.0, lambda name, results: True)
    copy, product = (times[name].median_us for name in calls)
    rates = (2 * source.nbytes / copy / 1e6, 2 * 8192**3 / product / 1e6)
    rows = [
        {"op": "ceiling", "case": name, "rate": rate, "unit": unit}
        for name, rate, unit in zip(calls, rates, ("TB/s", "TFLOP/s"), strict=True)
    ]
    for row in rows:
        print(f"{row['case']}: {row['rate']:.4g} {row['unit']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Check and time the kernels on this GPU")
    parser.add_argument("--minutes", type=float, default=25.0, help="no case starts after these")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing, for each case")
    parser.add_argument("--steps", default=",".join(STEPS), help="comma-separated")
    parser.add_argument("--match", default="", help="only cases with this in their names")
    parser.add_argument("--providers", help="comma-separated names; all if left out")
    parser.add_argument("--commit", default="", help="where the files come without their history")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device; benchmarks.attention runs on a CPU too")
    unknown = set(options.steps.split(",")) - set(STEPS)
    if unknown:
        raise SystemExit(f"--steps: unknown {sorted(unknown)}; want some of {', '.join(STEPS)}")
    device = torch.device("cuda")
    recorder = recorder_for(device, commit=options.commit, folder=options.out)
    num_bad = _run(options, device, recorder)
    print(f"written to {recorder.path.name}; {num_bad} wrong or impossible")
    raise SystemExit(num_bad > 0)


def _run(options: argparse.Namespace, device: torch.device, recorder: Recorder) -> int:
    deadline = time.monotonic() + 60 * options.minutes
    only = options.providers.split(",") if options.providers else None
    num_bad = 0
    try:
        for step in options.steps.split(","):
            if step == "ceilings":
                recorder.append(ceilings(device))
                torch.cuda.empty_cache()
            elif step == "correctness":
                num_bad += correctness.run(device, recorder, deadline)
                num_bad += sum(
                    check_suite(suite, device, recorder, deadline) for suite in SUITES.values()
                )
            elif step == "decode_step":
                num_bad += decode_step.run(
                    device,
                    recorder,
                    budget_s=options.seconds,
                    deadline=deadline,
                    match=options.match,
                    only=set(only) if only else None,
                )
            else:
                num_bad += run_suite(
                    SUITES[step],
                    device,
                    recorder,
                    budget_s=options.seconds,
                    deadline=deadline,
                    match=options.match,
                    only=only,
                )
    except DeviceLost as error:
        print(f"the device is lost to this process: {error}")
        num_bad += 1
    return num_bad


if __name__ == "__main__":
    main()
