"""musiclm generate."""

import time
from pathlib import Path
from typing import Annotated

import typer

from musiclm_engine.commands.terminal import (
    DECODE_THREADS,
    DeviceOption,
    ModelOption,
    ThreadsOption,
    progress_bars,
    set_threads,
    told_plainly,
)

REPEATED = ("prompts", "seconds", "num_samples", "seed", "setting", "model")  # in a record


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
    with told_plainly():
        from musiclm_engine.doubts import doubt_of_length, doubt_of_similarity, doubt_of_words
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
        set_threads(threads)
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
            tell(doubt_of_length(musiclm.unread(prompt)))
        started = time.perf_counter()
        with progress_bars() as show:
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


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


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
