"""musiclm eval and eval-codec."""

from pathlib import Path
from typing import Annotated

import typer

from musiclm_engine.commands.terminal import (
    DECODE_THREADS,
    DeviceOption,
    ManifestOption,
    ModelOption,
    ThreadsOption,
    progress_bars,
    set_threads,
    told_plainly,
)


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
    with told_plainly():
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
        set_threads(threads)
        model_sha256 = fingerprint(model_folder(model))
        musiclm = MusicLM.from_pretrained(model, device=device)
        with progress_bars() as show:
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
    with told_plainly():
        from musiclm_engine.checkpoint import write_json
        from musiclm_engine.evaluation.codec_judgement import evaluate_codec
        from musiclm_engine.evaluation.report import codec_table
        from musiclm_engine.musiclm import check_device, model_folder

        if run_dir is not None and model is not None:
            raise ValueError("--model and --run-dir both say where the codec is: leave one out")
        stem = model_folder(model) / "codec" if run_dir is None else run_dir / "codec" / "model"
        set_threads(threads)
        with progress_bars() as show:
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


def _parse_part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal()):
        raise ValueError(f"--part {text}: wanted K/N, as 1/2")
    return int(number), int(of)
