"""What the commands share: options, bars, and errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, max=1024, help="CPU threads; 0 leaves the choice to PyTorch.")
]
DECODE_THREADS = 1  # a token's matrices are small: on two cores, two threads took twice as long
ModelOption = Annotated[
    Path | None, typer.Option(help="Folder of a model; the bundled one if not given.")
]
ManifestOption = Annotated[Path, typer.Option(help="Manifest of the clips and their captions.")]


class ProgressBars:
    """One bar for each thing that is going on, made when it is first heard of."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def print(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def progress_bars() -> Iterator[ProgressBars]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield ProgressBars(bars)


@contextmanager
def told_plainly() -> Iterator[None]:
    """What a user can mend is one line and exit status 1, not a traceback."""
    try:
        yield
    except (ValueError, OSError, MemoryError, ModuleNotFoundError, FloatingPointError) as error:
        typer.echo(f"musiclm: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("musiclm: interrupted", err=True)
        raise typer.Exit(130) from None


def set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)
