"""Our attention on a GPU against its float64 definition, with each of its arguments.

The budget is twice what the definition itself errs in the same precision: computed by the op's CPU
body, which is the definition, on the same numbers.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.attention import AttentionCase, make_inputs
from benchmarks.case import Tensors, to_float64
from benchmarks.gate import judge
from benchmarks.record import FAILED, RIGHT, WRONG, Recorder, Row
from musiclm_kernels import biased_attention

DTYPES = ("bfloat16", "float16", "float32")
# Around the sides of a tile, and the two layouts of the audio tower
SHAPES: tuple[dict[str, Any], ...] = (
    {"grid_columns": 1},
    {"grid_columns": 63},
    {"grid_columns": 129},
    {"grid_columns": 513},
    {"grid_rows": 8, "grid_columns": 62},
    {"grid_rows": 8, "grid_columns": 62, "kept": 372},
    {"grid_rows": 8, "grid_columns": 62, "layout": "BNHD"},
    {"grid_columns": 129, "bias": "none"},
    {"grid_columns": 129, "table_gradient": False},
    {"grid_columns": 129, "head_dim": 32},
    {"grid_columns": 129, "head_dim": 128},
)
# Sixteen roundings of float32: no result here is what is left of a sum that cancels.
NOISE = 16 * 2.0**-24
SHAPES_WITH_OPTIONS = (SHAPES[2], SHAPES[5])


@dataclass(frozen=True)
class Option:
    """A way to call the op: how its inputs change, and what else it is given."""

    name: str
    num_key_heads: int | None = None
    arguments: Callable[[AttentionCase, Tensors], dict[str, Any]] = lambda case, inputs: {}


def _half_masked(case: AttentionCase, inputs: Tensors) -> dict[str, Any]:
    keys = torch.arange(case.length, device=inputs["q"].device)
    return {"key_mask": (keys < max(1, case.length // 2)).expand(case.batch, -1)}


def _bound(case: AttentionCase, inputs: Tensors) -> dict[str, Any]:
    norms = [inputs[name].detach().float().norm(dim=-1).amax(dim=(0, 2)) for name in ("q", "k")]
    return {"score_bound": norms[0] * norms[1] * case.head_dim**-0.5}


OPTIONS = (
    Option("plain"),
    Option("causal", arguments=lambda case, inputs: {"causal": True}),
    Option("key_mask", arguments=_half_masked),
    Option("score_bound", arguments=_bound),
    Option("two key heads", num_key_heads=2),
    Option("dropout", arguments=lambda case, inputs: {"dropout": 0.1, "dropout_seed": 7}),
)


def attend(case: AttentionCase, option: Option, inputs: Tensors) -> Tensors:
    """The op's output and gradients on these inputs, wherever they are."""
    leaves = {
        name: tensor.detach().requires_grad_(name in case.trained())
        for name, tensor in inputs.items()
    }
    biased = case.bias == "table"
    codes = leaves["codes"] if biased else None
    out = biased_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        table=leaves["table"] if biased else None,
        q_codes=codes,
        k_codes=codes,
        offset=case.offset,
        grid_rows=case.grid_rows,
        **option.arguments(case, inputs),
    )
    trained = case.trained()
    gradients = torch.autograd.grad(out, [leaves[name] for name in trained], inputs["grad_out"])
    found = {f"grad_{name}": g for name, g in zip(trained, gradients, strict=True)}
    return {"out": out.detach(), **found}


def check(case: AttentionCase, option: Option, device: torch.device) -> Row:
    """The row of one call."""
    inputs = make_inputs(case, torch.device("cpu"))
    if option.num_key_heads:
        inputs |= {name: inputs[name][:, : option.num_key_heads] for name in ("k", "v")}
    row = {**case.as_row(), "op": "correctness", "provider": "ours"}
    row["case"] = f"{option.name}: {row['case']}"
    try:
        results = attend(case, option, {n: t.to(device) for n, t in inputs.items()})
        truth = attend(case, option, to_float64(inputs))
        verdict = judge(results, truth, attend(case, option, inputs), noise=NOISE)
    except (RuntimeError, ValueError) as error:
        return {**row, "status": FAILED, "reason": f"{type(error).__name__}: {error}"[:500]}
    if not verdict.passed:
        return {**row, "status": WRONG, "reason": verdict.failure}
    return {**row, "status": RIGHT, "errors": verdict.as_row()}


def cases() -> Iterator[tuple[AttentionCase, Option]]:
    """Everything that is checked: every shape plainly, and some with each option."""
    for dtype in DTYPES:
        for shape in SHAPES:
            case = AttentionCase(batch=2, dtype=dtype, mode="forward+backward", **shape)
            options = OPTIONS if shape in SHAPES_WITH_OPTIONS else OPTIONS[:1]
            yield from ((case, option) for option in options)


def run(device: torch.device, recorder: Recorder | None, deadline: float = float("inf")) -> int:
    """Check everything, writing each down; print what is not right.

    Args:
        deadline: on `time.monotonic`'s clock; no check starts after it.

    Returns:
        How many were not right.
    """
    num_right = num_bad = 0
    for case, option in cases():
        if time.monotonic() > deadline:
            print("correctness: no time left for what follows", flush=True)
            break
        row = check(case, option, device)
        if recorder is not None:
            recorder.append([row])
        if row["status"] == RIGHT:
            num_right += 1
        else:
            num_bad += 1
            print(f"{row['case']}: {row['status']}: {row['reason']}", flush=True)
    print(f"correctness: {num_right} right, {num_bad} not", flush=True)
    return num_bad
