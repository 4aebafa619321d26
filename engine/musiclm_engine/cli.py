"""The command `musiclm`. Heavy imports stand inside the commands, so that `--help` is quick."""

from pathlib import Path
from typing import Annotated

import typer

from musiclm_engine.commands.generate import generate
from musiclm_engine.commands.judge import evaluate, evaluate_codec
from musiclm_engine.commands.terminal import progress_bars, told_plainly
from musiclm_engine.commands.train import bundle, train, unpack

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text to music: generate, train and judge MusicLM models.",
)
app.command()(generate)
app.command()(train)
app.command()(unpack)
app.command()(bundle)
app.command("eval")(evaluate)
app.command("eval-codec")(evaluate_codec)


@app.command()
def info() -> None:
    """Versions, devices, the bundled model, and which body runs each operation."""
    with told_plainly():
        import torch

        from musiclm_engine.info import describe

        for line in describe(torch.cuda.device_count()):
            typer.echo(line)


data = typer.Typer(no_args_is_help=True, help="Training data.")
app.add_typer(data, name="data")


@data.command("build")
def build(
    out: Annotated[Path, typer.Argument(help="Folder of the corpus.")] = Path("corpus"),
    hours: Annotated[float, typer.Option(help="Of audio, 115 MB an hour at most.")] = 2.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    soundfont: Annotated[
        Path | None, typer.Option(help="An .sf2 or .sf3 file; the bundled one if not given.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core if not given.")] = None,
) -> None:
    """Render real scores to captioned audio. The same command goes on with a build cut short."""
    with told_plainly():
        from musiclm_engine.data.build import build_corpus

        with progress_bars() as show:
            manifest = build_corpus(
                out,
                hours=hours,
                seed=seed,
                soundfont=soundfont,
                workers=workers,
                on_progress=lambda done, total: show("clips", done, total),
            )
        typer.echo(f"{manifest}")


def main() -> None:
    app(prog_name="musiclm")


if __name__ == "__main__":
    main()
