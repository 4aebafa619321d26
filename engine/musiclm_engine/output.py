"""What a generation leaves on disk: candidates as audio, a spectrogram, and how to make it again."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musiclm_engine.audio import save_audio
from musiclm_engine.audio.files import AudioFileError
from musiclm_engine.checkpoint import CheckpointError, read_json, write_json
from musiclm_engine.whole_file import whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from musiclm_engine.musiclm import MusicLMOutput

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
DOTS_PER_INCH = 100


@dataclass(frozen=True)
class Request:
    """All that decides what is generated, together with the model's weights.

    Attributes:
        prompts, seconds, num_samples, seed, settings: as `MusicLM.generate` takes them.
        model: folder of the model; None is the bundled one.
    """

    prompts: tuple[str, ...]
    seconds: float = 10.0
    num_samples: int = 4
    seed: int = 0
    settings: dict[str, float] = field(default_factory=dict)
    model: str | None = None


def read_request(path: Path) -> Request:
    """The request in a file that `write_outputs` wrote.

    Raises:
        CheckpointError: there is none, or the file holds something else.
    """
    content = read_json(path)
    try:
        request = Request(**content["request"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the record of a generation: {error!r}") from None
    for name, value, kinds in (
        ("prompts", request.prompts, list),
        ("seconds", request.seconds, int | float),
        ("num_samples", request.num_samples, int),
        ("seed", request.seed, int),
        ("settings", request.settings, dict),
        ("model", request.model, str | None),
    ):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{path} is not the record of a generation: {name} is {value!r}")
    return replace(request, prompts=tuple(request.prompts))


def check_same_model(path: Path, model_sha256: str) -> None:
    """Refuse to repeat with other weights what `write_outputs` recorded.

    Raises:
        CheckpointError: the model has changed since.
    """
    if read_json(path).get("model_sha256") != model_sha256:
        raise CheckpointError(
            f"{path} was made with other weights than the model now holds: it cannot be repeated"
        )


def check_output(out: Path, *, spectrogram: bool) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        AudioFileError: the folder is not there or not writable, or the suffix unknown.
        ModuleNotFoundError: a spectrogram is wanted and nothing can draw it.
    """
    if out.suffix.lower() not in AUDIO_SUFFIXES:
        raise AudioFileError(f"{out} wanted a name ending in {', '.join(AUDIO_SUFFIXES)}")
    folder = out.parent
    if not folder.is_dir():
        raise AudioFileError(f"{out}: there is no folder {folder}")
    for path in (out, out.with_suffix(".json"), out.with_suffix(".png")):
        if path.is_dir() or not os.access(folder, os.W_OK):
            raise AudioFileError(f"{path}: cannot be written")
    if spectrogram:
        _pyplot()


def write_outputs(
    result: "MusicLMOutput",
    request: Request,
    out: Path,
    *,
    spectrogram: bool,
    model_sha256: str,
    usual_similarity: float | None = None,
    doubts: Sequence[str] = (),
) -> list[tuple[Path, float | None]]:
    """Write every candidate, then the record, then the picture.

    One prompt: OUT, OUT-2, OUT-3 … in order of score. Several: OUT-prompt1, OUT-prompt1-2 …

    Args:
        model_sha256: `musiclm.fingerprint` of the weights, for the record.
        usual_similarity: `MusicLM.usual_similarity`, for the record.
        doubts: what was said of the prompts, for the record.

    Returns:
        each path, with the score of the candidate if it is one.
    """
    written: list[tuple[Path, float | None]] = []
    candidates = []
    for p, prompt in enumerate(request.prompts):
        stem = out.stem if len(request.prompts) == 1 else f"{out.stem}-prompt{p + 1}"
        for n, audio in enumerate(result.audio[p]):
            path = out.with_name(stem + ("" if n == 0 else f"-{n + 1}") + out.suffix)
            score = result.scores[p, n].item()
            save_audio(path, audio, result.sample_rate)
            written.append((path, score))
            candidate = {"file": path.name, "prompt": prompt, "mulan_similarity": score}
            if result.tempo_bpm is not None:
                candidate["tempo_bpm"] = round(result.tempo_bpm[p, n].item(), 1)
            candidates.append(candidate)
    record = out.with_suffix(".json")
    write_json(
        record,
        {
            "request": asdict(request),
            "model_sha256": model_sha256,
            "candidates": candidates,
            "usual_similarity": usual_similarity,
            "doubts": list(doubts),
            "versions": _versions(),
        },
    )
    written.append((record, None))
    if spectrogram:
        picture = out.with_suffix(".png")
        draw_spectrogram(result.audio[0, 0], result.sample_rate, picture, request.prompts[0])
        written.append((picture, None))
    return written


def draw_spectrogram(
    audio: "Tensor",
    sample_rate_hz: int,
    path: Path,
    title: str,
    *,
    size_pixels: tuple[int, int] = (1000, 400),
) -> None:
    """Draw audio [samples] as a picture of decibels over time and frequency."""
    pyplot = _pyplot()
    width, height = (pixels / DOTS_PER_INCH for pixels in size_pixels)
    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.specgram(
        audio.cpu().numpy() + 1e-7,
        NFFT=1024,
        noverlap=768,
        Fs=sample_rate_hz,
        vmin=-140,
        cmap="magma",
    )
    axes.set(xlabel="time (s)", ylabel="frequency (Hz)")
    axes.set_title(title, parse_math=False)  # a prompt with two dollars is no formula
    try:
        with whole_file(path) as unfinished:
            figure.savefig(unfinished, dpi=DOTS_PER_INCH)
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError(
            'drawing needs matplotlib: pip install "musiclm-engine[plot]"'
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _versions() -> dict[str, str]:
    found = {}
    for package in ("musiclm-engine", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
