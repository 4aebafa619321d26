"""The committed budgets: {Triton version: {arch: {variant: {kernel: figures}}}}, as JSON."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.offline.cubin import Figures

COMMITTED = Path(__file__).with_name("budgets.json")

Budget = dict[str, dict[str, dict[str, Figures]]]
"""Of one Triton version: arch, variant, kernel."""


def load(path: Path, version: str) -> Budget | None:
    """The budget of one Triton version, or None if the file has none.

    Raises:
        ValueError: it lists other figures than `Figures` does now.
    """
    written = _load_all(path).get(version)
    if written is None:
        return None
    listed = {frozenset(f) for v in written.values() for ks in v.values() for f in ks.values()}
    if not listed <= {frozenset(field.name for field in dataclasses.fields(Figures))}:
        raise ValueError(f"{path}: Triton {version} has figures of another kind: delete and update")
    return {
        arch: {
            name: {kernel: Figures(**figures) for kernel, figures in kernels.items()}
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
            name: {kernel: dataclasses.asdict(figures) for kernel, figures in kernels.items()}
            for name, kernels in variants.items()
        }
        for arch, variants in budget.items()
    }
    path.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


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


def _load_all(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
