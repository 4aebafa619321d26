"""Plots of result files: `python -m benchmarks.plots FILE…` draws into docs/plots/."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.record import Row, read

FOLDER = Path(__file__).parents[1] / "docs" / "plots"


def newest_times(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """By case and provider, the timed row that was written last."""
    newest: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "median_us" in row:
            newest.setdefault(row["case"], {})[row["provider"]] = row
    return newest


def plot(path: Path, folder: Path = FOLDER) -> list[Path]:
    """Draw a file's times, a picture for each op: a panel a case, a bar a provider.

    Returns:
        the pictures.
    """
    # A heavy import, of a package that only drawing needs
    from matplotlib.figure import Figure

    content = read(path)
    devices = {run["run"]: run["device"] for run in content["runs"]}
    pictures = []
    for op in sorted({row["op"] for row in content["rows"]}):
        rows = [row for row in content["rows"] if row["op"] == op]
        cases = newest_times(rows)
        if not cases:
            continue
        heights = [1.0 + 0.3 * len(providers) for providers in cases.values()]
        figure = Figure(figsize=(9, sum(heights)), layout="constrained")
        panels = figure.subplots(
            len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axes, (case, providers) in zip(panels[:, 0], cases.items(), strict=True):
            _draw_case(axes, case, providers)
        figure.suptitle(f"{op} on {devices[rows[0]['run']]}", fontsize="medium")
        folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"-\d{4}-\d\d-\d\d$", "", path.stem)
        picture = folder / f"{op.replace(' ', '-')}-{device}.png"
        figure.savefig(picture, dpi=110)
        pictures.append(picture)
    return pictures


def _draw_case(axes, case: str, providers: dict[str, Row]) -> None:  # type: ignore[no-untyped-def]
    ordered = sorted(providers.values(), key=lambda row: -row["median_us"])
    times = [row["median_us"] / 1e3 for row in ordered]
    spread = [
        [(row["median_us"] - row["low_us"]) / 1e3 for row in ordered],
        [(row["high_us"] - row["median_us"]) / 1e3 for row in ordered],
    ]
    # Grey: what computes less than the case asks for
    colours = [
        "tab:gray" if "answers" in row else "tab:red" if "ours" in row["provider"] else "tab:blue"
        for row in ordered
    ]
    axes.barh([row["provider"] for row in ordered], times, xerr=spread, color=colours)
    floor = max((row["floor_us"] or 0.0 for row in ordered), default=0.0)
    if floor:
        axes.axvline(floor / 1e3, linestyle="--", color="black", linewidth=0.8)
    axes.set_title(case, fontsize="small", loc="left")
    notes = ["median, 20-80 %"]
    notes += ["dashed: the device's floor"] if floor else []
    notes += ["grey: an easier case"] if "tab:gray" in colours else []
    axes.set_xlabel(f"ms ({'; '.join(notes)})", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.set_xlim(left=0)


def main() -> None:
    """Draw what the command line names."""
    for argument in sys.argv[1:]:
        for picture in plot(Path(argument)):
            print(picture.relative_to(FOLDER.parents[1]))


if __name__ == "__main__":
    main()
