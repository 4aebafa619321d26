"""The committed budgets: {Triton version: {arch: {variant: {kernel: figures}}}}, as JSON."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.offline.cubin import Figures

COMMITTED = Path(__file__).with_name("budgets.json")

# What a kernel without it does not list.
_NOTHING: dict[str, Any] = {
    "shared_bytes": 0,
    "spill_bytes": 0,
    "loop_instructions": [],
    "loop_opcodes": [],
    "tensor_cores": {},
    "scalar_dots": 0,
    "float_atomics": 0,
    "async_gathers": 0,
    "fused_adds": 0,
    "grid_waits": 0,
    "loads_ahead": 0,
}

Budget = dict[str, dict[str, dict[str, Figures]]]
"""Of one Triton version: arch, variant, kernel."""


def load(path: Path, version: str) -> Budget | None:
    """The budget of one Triton version, or None if the file has none.

    Raises:
        ValueError: it lists other figures than `Figures` has now.
    """
    written = _load_all(path).get(version)
    if written is None:
        return None
    names = {field.name for field in dataclasses.fields(Figures)}
    listed = [figures for v in written.values() for ks in v.values() for figures in ks.values()]
    if any((_NOTHING | figures).keys() != names for figures in listed):
        raise ValueError(f"{path}: Triton {version} has figures of another kind: delete and update")
    return {
        arch: {
            name: {kernel: Figures(**(_NOTHING | figures)) for kernel, figures in kernels.items()}
            for name, kernels in variants.items()
        }
        for arch, variants in written.items()
    }


def versions(path: Path) -> list[str]:
    """The Triton versions that the file has budgets for."""
    return list(_load_all(path))


def save(path: Path, version: str, budget: Budget) -> None:
    """Replace one Triton version's budget, leaving the others."""
    written = _load_all(path)
    written[version] = {
        arch: {
            name: {kernel: _without_zeros(figures) for kernel, figures in kernels.items()}
            for name, kernels in variants.items()
        }
        for arch, variants in budget.items()
    }
    path.write_text(_dump(written, depth=4) + "\n")


def updated(
    budget: Budget,
    measured: Iterable[tuple[str, int, dict[str, Figures]]],
    shipped: set[tuple[str, int]],
) -> Budget:
    """The budget with what was measured, (variant's name, arch, kernels), and only what is shipped."""
    result: Budget = {
        arch: {name: kernels for name, kernels in variants.items() if (name, int(arch)) in shipped}
        for arch, variants in budget.items()
    }
    for name, arch, kernels in measured:
        result.setdefault(str(arch), {})[name] = kernels
    return result


def _without_zeros(figures: Figures) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(figures).items() if value}


def _dump(value: Any, depth: int) -> str:
    """JSON with a line for each kernel, so that a diff shows which ones changed."""
    if depth == 0 or not value:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    lines = (f"{json.dumps(name)}: {_dump(value[name], depth - 1)}" for name in sorted(value))
    return "{\n" + ",\n".join(lines) + "\n}"


def _load_all(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
