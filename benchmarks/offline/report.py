"""The table of all figures beside their budgets, and the list of what is wrong."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.offline.cubin import Figures
from benchmarks.offline.measure import Measurement

Violations = dict[tuple[str, int], dict[str, list[str]]]
"""By (variant's name, arch), then by kernel."""


def show(
    console: Console,
    title: str,
    measured: list[Measurement],
    budgets: dict[tuple[str, int], dict[str, Figures]],
    violations: Violations,
) -> None:
    """Print one row a kernel, "now / budget" where the two differ, and every violation below."""
    table = Table(title=title, title_justify="left")
    table.add_column("variant", overflow="fold")
    table.add_column("kernel", overflow="fold")
    for heading in ("sm", "registers", "shared", "spills", "CTAs/SM", "loops", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("in the loops, line by line", overflow="fold")
    for one in measured:
        budget = budgets.get((one.name, one.arch), {})
        wrong = violations.get((one.name, one.arch), {})
        for kernel, figures in one.kernels.items():
            table.add_row(
                one.name,
                kernel,
                str(one.arch),
                *_beside(figures, budget.get(kernel)),
                f"{one.seconds:.1f}",
                "\n".join(_listed(opcodes) for opcodes in figures.loop_opcodes),
                style="red" if kernel in wrong else None,
            )
        if one.error is not None:
            table.add_row(one.name, "", str(one.arch), *"------", "does not compile", style="red")
    if measured:
        console.print(table)
    for (name, arch), wrong in sorted(violations.items()):
        for kernel, reasons in wrong.items():
            for reason in reasons:
                where = " ".join(part for part in (name, kernel, f"sm_{arch}") if part)
                console.print(Text(f"{where}: {reason}", style="red"))


def _beside(figures: Figures, budget: Figures | None) -> list[str]:
    names = ("registers", "shared_bytes", "spill_bytes", "ctas_per_sm", "loop_instructions")
    cells = []
    for name in names:
        now = _plain(getattr(figures, name))
        then = now if budget is None else _plain(getattr(budget, name))
        cells.append(now if now == then else f"{now} / {then}")
    return cells


def _plain(value: int | list[int]) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _listed(opcodes: dict[str, int]) -> str:
    return " ".join(f"{opcode}:{count}" for opcode, count in opcodes.items())
