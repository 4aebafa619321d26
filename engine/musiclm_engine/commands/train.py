"""musiclm train, unpack and bundle."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from musiclm_engine.commands.terminal import (
    DeviceOption,
    ManifestOption,
    ThreadsOption,
    progress_bars,
    set_threads,
    told_plainly,
)


def train(
    model: Annotated[
        str,
        typer.Argument(
            help="codec, semantic_encoder, tokenizer, mulan, quantizer, tempo_reader, "
            "semantic, coarse or fine, most of which need those before them; or all, one after another."
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
    with told_plainly():
        from musiclm_engine.musiclm import check_device
        from musiclm_engine.training.bundle import bundle_run
        from musiclm_engine.training.run import Limits, checked_config
        from musiclm_engine.training.run import train as train_models

        set_threads(threads)
        checked_config(model, config)  # before anything is rendered
        on_device = check_device(device)
        with progress_bars() as show:

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


def unpack(
    parcel: Annotated[Path, typer.Argument(help="Folder that train --parcel wrote.")],
    run_dir: Annotated[
        Path, typer.Argument(help="Folder to go on in; it must not hold a run yet.")
    ],
) -> None:
    """Lay out a run that was carried here, for train to go on with or bundle to gather."""
    with told_plainly():
        from musiclm_engine.training.parcel import unpack as unpack_run

        unpack_run(parcel, run_dir)
        typer.echo(f"{run_dir}")


def bundle(
    out: Annotated[Path, typer.Argument(help="Folder to write the model to.")],
    run_dir: Annotated[Path, typer.Option(help="Folder of a trained set.")] = Path("runs/tiny"),
    config: Annotated[str, typer.Option(help="The configuration it was trained with.")] = "tiny",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights on disk: float16, float32, bfloat16, or int8 for the stages and "
            "float16 for the others. A model loads in float32, whatever it was stored in."
        ),
    ] = "float16",
) -> None:
    """Gather a trained set of models into one folder that `generate --model` reads."""
    with told_plainly():
        from musiclm_engine.checkpoint import STORED
        from musiclm_engine.training.bundle import bundle_run

        if dtype not in STORED:
            raise ValueError(f"--dtype {dtype}: wanted {', '.join(STORED)}")
        bundle_run(run_dir, config=config).save_pretrained(out, dtype=STORED[dtype])
        typer.echo(f"{out}")
