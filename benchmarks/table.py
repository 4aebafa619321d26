"""Result rows as a table: `python -m benchmarks.table FILE…`."""

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.record import ABOVE_ROOF, CANNOT_RUN, TIMED, WRONG, Row, read


def print_table(rows: Iterable[Row], baseline: str, console: Console | None = None) -> None:
    """Print rows, a table for each run of a case; times also as multiples of the baseline's."""
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    for (_, title), group in groupby(
        rows, key=lambda row: (row.get("run"), f"{row['op']}: {row['case']}")
    ):
        case_rows = list(group)
        console.print(_table(title, case_rows, baseline))
        without_time: dict[str, list[str]] = {}
        for row in case_rows:
            if "median_us" not in row:
                without_time.setdefault(f"{row['status']}: {row['reason']}", []).append(
                    row["provider"]
                )
        for reason, names in without_time.items():
            console.print(f"{'; '.join(names)}: {reason}", markup=False, highlight=False)


def _table(title: str, rows: list[Row], baseline: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("provider")
    headings = ("time", "20-80 %", "by", "TFLOP/s", "of roof", "peak", f"/ {baseline}", "error")
    for heading in headings:
        table.add_column(heading, justify="right")
    timed = [row for row in rows if "median_us" in row]
    reference = next((row["median_us"] for row in timed if row["provider"] == baseline), None)
    for row in timed:
        share, peak = row["share_of_floor"], row["peak_bytes"]
        unit, name = next((u, n) for u, n in _UNITS if row["median_us"] >= u or u == 1)
        table.add_row(
            row["provider"],
            f"{row['median_us'] / unit:.4g} {name}",
            f"{row['low_us'] / unit:.4g} - {row['high_us'] / unit:.4g}",
            row["method"],
            f"{row['tflops']:.3g}",
            f"{share:.0%}" if share else "",
            f"{peak / 2**20:.0f} MiB" if peak is not None else "",
            f"{row['median_us'] / reference:.2f}" if reference else "",
            f"{row['share_of_budget']:.0%}",
        )
    table.caption = "error: as a share of what is allowed" if timed else None
    return table


_UNITS = ((1e6, "s"), (1e3, "ms"), (1, "us"))


def main() -> None:
    """Print result files."""
    for argument in sys.argv[1:]:
        rows = read(Path(argument))["rows"]
        statuses = (TIMED, CANNOT_RUN, WRONG, ABOVE_ROOF)
        print_table([row for row in rows if row.get("status") in statuses], baseline="ours")


if __name__ == "__main__":
    main()
