"""The command `python -m benchmarks.offline`."""

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import triton
import typer
from rich.console import Console
from rich.progress import track
from triton import knobs

from benchmarks.offline import budgets
from benchmarks.offline.budgets import Budget
from benchmarks.offline.cubin import Figures
from benchmarks.offline.gates import violations
from benchmarks.offline.measure import Measurement, load_variants, measure_all
from benchmarks.offline.promises import ARCHITECTURES, Variant
from benchmarks.offline.report import Violations, show

WIDTH = 160  # of the table where there is no terminal

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    update: Annotated[bool, typer.Option("--update", help="Accept the figures as budget.")] = False,
    arch: Annotated[
        list[int] | None, typer.Option(help="Compute capability, as 90; repeat for several.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Name of a variant, or a pattern as 'attention*'.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Compile in this many processes.")] = 2,
    variants: Annotated[
        str, typer.Option(help="What to compile: module:list.")
    ] = "benchmarks.offline.variants:VARIANTS",
    budget_file: Annotated[
        Path, typer.Option("--budgets", help="JSON file.", show_default="the committed one")
    ] = budgets.COMMITTED,
) -> None:
    """Compile every shipped kernel for each GPU architecture and hold it to its budget.

    Needs no GPU. Exits with 1 if a kernel costs more than its budget or breaks a promise.
    """
    if knobs.runtime.interpret:
        raise typer.BadParameter("unset TRITON_INTERPRET: interpreted functions do not compile")
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    version = triton.__version__
    budget = budgets.load(budget_file, version)
    if budget is None and not update:
        known = ", ".join(budgets.versions(budget_file)) or "none"
        console.print(f"No budget for Triton {version} (there is one for: {known}). Write it with")
        console.print("  python -m benchmarks.offline --update")
        raise typer.Exit(1)
    budget = budget or {}  # a new version's, before its first update

    shipped = load_variants(variants)
    chosen = [variant for variant in shipped if _is_chosen(variant.name, only)]
    tasks = [(v.name, a) for v in chosen for a in v.archs if a in (arch or ARCHITECTURES)]
    if (only or arch) and not tasks:
        raise typer.BadParameter("--only and --arch leave no variant")
    measured = _measure(variants, tasks, jobs)

    of_tasks = {(name, a): budget.get(str(a), {}).get(name, {}) for name, a in tasks}
    wrong = _judge(measured, chosen, None if update else of_tasks)
    pairs = {(variant.name, a) for variant in shipped for a in variant.archs}
    if update:
        new = [(one.name, one.arch, one.kernels) for one in measured if one.error is None]
        budgets.save(budget_file, version, budgets.updated(budget, new, pairs))
    else:
        wrong |= _left_over(budget, pairs)
    show(console, f"Triton {version}", measured, of_tasks, wrong)
    console.print(
        f"{sum(len(one.kernels) for one in measured)} kernels of {len(chosen)} variants in "
        f"{sum(one.seconds for one in measured):.0f} process-seconds, "
        f"{sum(len(reasons) for found in wrong.values() for reasons in found.values())} violations"
    )
    raise typer.Exit(1 if wrong else 0)


def _is_chosen(name: str, patterns: list[str] | None) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _measure(source: str, tasks: list[tuple[str, int]], jobs: int) -> list[Measurement]:
    progress = track(
        measure_all(source, tasks, jobs),
        "Compiling",
        total=len(tasks),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    return sorted(progress, key=lambda one: tasks.index((one.name, one.arch)))


def _judge(
    measured: list[Measurement],
    variants: list[Variant],
    budget: dict[tuple[str, int], dict[str, Figures]] | None,
) -> Violations:
    by_name = {variant.name: variant for variant in variants}
    wrong: Violations = {}
    for one in measured:
        task = (one.name, one.arch)
        accepted = None if budget is None else budget[task]
        if one.error is not None:
            wrong[task] = {"": [one.error]}
        elif found := violations(by_name[one.name], one.arch, one.kernels, accepted):
            wrong[task] = found
    return wrong


def _left_over(budget: Budget, shipped: set[tuple[str, int]]) -> Violations:
    listed = {(name, int(arch)) for arch, variants in budget.items() for name in variants}
    return {task: {"": ["has a budget and is not shipped"]} for task in listed - shipped}


if __name__ == "__main__":
    app()
