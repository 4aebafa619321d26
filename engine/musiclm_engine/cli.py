"""The command `musiclm`. Heavy imports stand inside the commands, so that `--help` is quick."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text to music: generate, train and judge MusicLM models.",
)
data = typer.Typer(no_args_is_help=True, help="Training data.")
app.add_typer(data, name="data")

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, max=1024, help="CPU threads; 0 leaves the choice to PyTorch.")
]
DECODE_THREADS = 1  # a token's matrices are small: on two cores, two threads took twice as long
ModelOption = Annotated[
    Path | None, typer.Option(help="Folder of a model; the bundled one if not given.")
]
REPEATED = ("prompts", "seconds", "num_samples", "seed", "setting", "model")  # in a record
ManifestOption = Annotated[Path, typer.Option(help="Manifest of the clips and their captions.")]


@app.command()
def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What the music should be, one or more.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the audio.")] = 10.0,
    num_samples: Annotated[int, typer.Option(help="Candidates a prompt, ranked by MuLaN.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same music.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Best candidate; the others are named OUT-2, OUT-3 …")
    ] = Path("music.wav"),
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A sampling setting, for one stage or all: semantic_temperature=0.9, guidance=2. "
            "Stages: semantic, coarse, fine. Settings: temperature, top_k, top_p, min_p, guidance.",
        ),
    ] = None,
    spectrogram: Annotated[
        bool, typer.Option("--spectrogram", help="Draw the best candidate beside it as PNG.")
    ] = False,
    repeat: Annotated[
        Path | None,
        typer.Option(help="Take prompt and all settings from the JSON file of an earlier run."),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = DECODE_THREADS,
) -> None:
    """Make music from text.

    Writes OUT, the other candidates, and OUT's name with .json: all that is needed to make exactly
    this again with the same model. Several prompts write OUT-prompt1, OUT-prompt2 …

    Example: musiclm generate "a slow hymn on a church organ in G minor" --out hymn.wav
    """
    with _told_plainly():
        from musiclm_engine.doubts import doubt_of_similarity, doubt_of_words
        from musiclm_engine.output import (
            Request,
            check_output,
            check_same_model,
            read_request,
            write_outputs,
        )

        if repeat is not None:
            given = [name for name in REPEATED if _is_given(context, name)]
            if given:
                raise ValueError(
                    "--repeat takes prompts and all settings from its file: "
                    f"leave out {', '.join(given)}"
                )
            request = read_request(repeat)
        else:
            request = Request(
                prompts=tuple(prompts or ()),
                seconds=seconds,
                num_samples=num_samples,
                seed=seed,
                settings=_parse_settings(setting or []),
                model=None if model is None else str(model.absolute()),
            )
        check_output(out, spectrogram=spectrogram)
        from musiclm_engine.musiclm import (
            MusicLM,
            check_prompts,
            check_settings,
            fingerprint,
            model_folder,
        )

        check_prompts(request.prompts)
        check_settings(request.settings)
        _set_threads(threads)
        model_sha256 = fingerprint(model_folder(request.model))
        if repeat is not None:
            check_same_model(repeat, model_sha256)
        musiclm = MusicLM.from_pretrained(request.model, device=device)
        doubts = []

        def tell(doubt: str | None) -> None:
            if doubt is not None:
                typer.echo(doubt, err=True)
                doubts.append(doubt)

        for prompt in request.prompts:
            tell(doubt_of_words(prompt, musiclm.mulan.unseen_words(prompt)))
        started = time.perf_counter()
        with _progress_bars() as show:
            result = musiclm.generate(
                request.prompts,
                seconds=request.seconds,
                num_samples=request.num_samples,
                seed=request.seed,
                decoding=None,
                on_progress=show,
                **request.settings,
            )
        elapsed = time.perf_counter() - started
        for prompt, best in zip(request.prompts, result.scores[:, 0].tolist(), strict=True):
            tell(doubt_of_similarity(prompt, best, musiclm.usual_similarity))
        written = write_outputs(
            result,
            request,
            out,
            spectrogram=spectrogram,
            model_sha256=model_sha256,
            usual_similarity=musiclm.usual_similarity,
            doubts=doubts,
        )
        for path, score in written:
            note = "" if score is None else f"  MuLaN similarity {score:.3f}"
            typer.echo(f"{path}{note}")
        count = result.audio.shape[0] * result.audio.shape[1]
        typer.echo(
            f"{count} candidates of {request.seconds:g} s in {elapsed:.1f} s: "
            f"{count * request.seconds / elapsed:.1f} x real time together"
        )


@app.command()
def train(
    model: Annotated[
        str,
        typer.Argument(
            help="codec, semantic_encoder, tokenizer, mulan, quantizer, semantic, coarse or fine, "
            "each of which needs those before it; or all, one after another."
        ),
    ],
    config: Annotated[
        str, typer.Option(help="Name of a bundled configuration, or a .toml file.")
    ] = "tiny",
    manifest: ManifestOption = Path("corpus/manifest.jsonl"),
    run_dir: Annotated[
        Path, typer.Option(help="Folder of the whole set of models; holds all checkpoints.")
    ] = Path("runs/tiny"),
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of training the whole set, which the models divide as the configuration says; "
            "without it, the configuration's steps are the end.",
        ),
    ] = None,
    stop_after: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes until it saves and stops; the same command goes on."),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(help="If there is no manifest, render a corpus this long first."),
    ] = None,
    bundle_to: Annotated[
        Path | None,
        typer.Option("--bundle", help="When the set is whole, gather it in this folder."),
    ] = None,
    parcel: Annotated[
        Path | None,
        typer.Option(
            help="At each checkpoint, pack the run here in files of at most 16 MiB, "
            "for musiclm unpack on another machine."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = 0,
) -> None:
    """Train a set of models or one of it, or go on where its checkpoint stands.

    Loss curves: tensorboard --logdir RUN_DIR
    """
    began = time.monotonic()
    with _told_plainly():
        from musiclm_engine.musiclm import check_device
        from musiclm_engine.training.bundle import bundle_run
        from musiclm_engine.training.run import Limits, checked_config
        from musiclm_engine.training.run import train as train_models

        _set_threads(threads)
        checked_config(model, config)  # before anything is rendered
        on_device = check_device(device)
        with _progress_bars() as show:

            def report(what: str, done: int, total: int, figures: dict[str, float]) -> None:
                held_out = {k: v for k, v in figures.items() if k.startswith("validation/")}
                if held_out:
                    text = ", ".join(f"{k[11:]} {v:.4f}" for k, v in held_out.items())
                    show.print(
                        f"{what} {done}: loss {figures['train/loss']:.4f}; held out: {text}; "
                        f"after {(time.monotonic() - began) / 60:.1f} min"
                    )
                show(what, done, total)

            if hours is not None and not manifest.exists():
                from musiclm_engine.data.build import MANIFEST_NAME, build_corpus

                if manifest.name != MANIFEST_NAME:
                    raise ValueError(
                        f"there is no {manifest}, and --hours renders a {MANIFEST_NAME}"
                    )
                clips_done = partial(show, "clips")
                build_corpus(manifest.parent, hours=hours, on_progress=clips_done)
            done = train_models(
                model,
                config=config,
                manifest=manifest,
                run_dir=run_dir,
                device=on_device,
                limits=Limits(minutes, None if stop_after is None else began + 60 * stop_after),
                parcel=parcel,
                report=report,
            )
        if not done:
            typer.echo("stopped and saved: the same command goes on")
        elif bundle_to is not None:
            bundle_run(run_dir, config=config).save_pretrained(bundle_to)
            typer.echo(f"{bundle_to}")


@app.command()
def unpack(
    parcel: Annotated[Path, typer.Argument(help="Folder that train --parcel wrote.")],
    run_dir: Annotated[
        Path, typer.Argument(help="Folder to go on in; it must not hold a run yet.")
    ],
) -> None:
    """Lay out a run that was carried here, for train to go on with or bundle to gather."""
    with _told_plainly():
        from musiclm_engine.training.parcel import unpack as unpack_run

        unpack_run(parcel, run_dir)
        typer.echo(f"{run_dir}")


@app.command()
def bundle(
    out: Annotated[Path, typer.Argument(help="Folder to write the model to.")],
    run_dir: Annotated[Path, typer.Option(help="Folder of a trained set.")] = Path("runs/tiny"),
    config: Annotated[str, typer.Option(help="The configuration it was trained with.")] = "tiny",
) -> None:
    """Gather a trained set of models into one folder that `generate --model` reads."""
    with _told_plainly():
        from musiclm_engine.training.bundle import bundle_run

        bundle_run(run_dir, config=config).save_pretrained(out)
        typer.echo(f"{out}")


@app.command("eval")
def evaluate(
    manifest: ManifestOption = Path("corpus/manifest.jsonl"),
    clips: Annotated[int, typer.Option(min=2, help="Held-out captions to generate from.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the choice of captions and of generation.")] = 0,
    work: Annotated[
        Path, typer.Option(help="Folder of candidates and judgements; the same command goes on.")
    ] = Path("runs/eval"),
    part: Annotated[
        str | None,
        typer.Option(help="K/N: the K-th of N parts of the captions, for processes side by side."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Write into the model's folder which MuLaN similarity is usual: generate then "
            "says when a prompt stays below.",
        ),
    ] = False,
    model: ModelOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = DECODE_THREADS,
) -> None:
    """Judge a model on captions of held-out pieces, with tools that took no part in training.

    Prints each attribute between its floor (captions shuffled) and its ceiling (true renderings),
    the codec's own figures, Frechet distances, and what the semantic stage knows by heart.
    """
    with _told_plainly():
        from musiclm_engine.checkpoint import write_json
        from musiclm_engine.evaluation.held_out import evaluate_held_out
        from musiclm_engine.evaluation.report import markdown_table
        from musiclm_engine.musiclm import (
            MusicLM,
            fingerprint,
            model_folder,
            write_usual_similarity,
        )

        if calibrate and part is not None:
            raise ValueError("--calibrate needs all captions: leave out --part")
        own_part = (1, 1) if part is None else _parse_part(part)
        _set_threads(threads)
        model_sha256 = fingerprint(model_folder(model))
        musiclm = MusicLM.from_pretrained(model, device=device)
        with _progress_bars() as show:
            figures = evaluate_held_out(
                musiclm,
                manifest,
                model_sha256=model_sha256,
                clips=clips,
                seed=seed,
                work=work,
                part=own_part,
                on_progress=show,
            )
        if figures is None:
            typer.echo(f"part {part} is in {work}; once all are, the command without --part judges")
            return
        if out is not None:
            write_json(out, figures)
        if calibrate:
            write_usual_similarity(model_folder(model), figures["mulan_similarity"]["usual"])
        typer.echo(markdown_table(figures))


@app.command("eval-codec")
def evaluate_codec(
    manifest: ManifestOption = Path("corpus/manifest.jsonl"),
    clips: Annotated[int, typer.Option(min=2, help="Clips of the validation split.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the choice of clips.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    model: ModelOption = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of a set in training, in place of --model.")
    ] = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = DECODE_THREADS,
) -> None:
    """Judge a codec alone: which notes and tags of a clip are left with 1, 2 ... of its levels."""
    with _told_plainly():
        from musiclm_engine.checkpoint import write_json
        from musiclm_engine.evaluation.codec_judgement import evaluate_codec
        from musiclm_engine.evaluation.report import codec_table
        from musiclm_engine.musiclm import check_device, model_folder

        if run_dir is not None and model is not None:
            raise ValueError("--model and --run-dir both say where the codec is: leave one out")
        stem = model_folder(model) / "codec" if run_dir is None else run_dir / "codec" / "model"
        _set_threads(threads)
        with _progress_bars() as show:
            figures = evaluate_codec(
                stem,
                manifest,
                clips=clips,
                seed=seed,
                device=check_device(device),
                on_progress=lambda done, total: show("clips", done, total),
            )
        if out is not None:
            write_json(out, figures)
        typer.echo(codec_table(figures))


@app.command()
def info() -> None:
    """Versions, devices, the bundled model, and which body runs each operation."""
    with _told_plainly():
        import torch

        from musiclm_engine.info import describe

        for line in describe(torch.cuda.device_count()):
            typer.echo(line)


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
    with _told_plainly():
        from musiclm_engine.data.build import build_corpus

        with _progress_bars() as show:
            manifest = build_corpus(
                out,
                hours=hours,
                seed=seed,
                soundfont=soundfont,
                workers=workers,
                on_progress=lambda done, total: show("clips", done, total),
            )
        typer.echo(f"{manifest}")


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
def _progress_bars() -> Iterator[ProgressBars]:
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
def _told_plainly() -> Iterator[None]:
    """What a user can mend is one line and exit status 1, not a traceback."""
    try:
        yield
    except (ValueError, OSError, MemoryError, ModuleNotFoundError, FloatingPointError) as error:
        typer.echo(f"musiclm: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("musiclm: interrupted", err=True)
        raise typer.Exit(130) from None


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parse_part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ValueError(f"--part {text}: wanted K/N, as 1/2")
    return int(number), int(of)


def _parse_settings(pairs: list[str]) -> dict[str, float]:
    settings: dict[str, float] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            number = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--set {pair}: wanted NAME=NUMBER")
        settings[name] = int(number) if number.is_integer() else number
    return settings


def main() -> None:
    app(prog_name="musiclm")


if __name__ == "__main__":
    main()
