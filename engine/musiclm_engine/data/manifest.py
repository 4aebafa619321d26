"""Manifests: one JSON object a line, each a clip of audio with its captions.

    {"audio": "clips/000000.flac", "seconds": 10.0, "captions": ["slow hymn, organ"],
     "split": "train", "piece": "bach/bwv10.7.mxl", "facts": {"instrument": "church organ"}}

`audio` is relative to the manifest. `facts` may hold anything; `split` is `train`,
`validation` or `test`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musiclm_engine.whole_file import whole_file

SPLITS = ("train", "validation", "test")
NUM_MISSING_NAMED = 5  # missing files an error lists before it only counts


class ManifestError(ValueError):
    """What is wrong with a manifest, and where."""


@dataclass(frozen=True)
class Clip:
    """One piece of audio and what is known about it."""

    audio: Path
    """Absolute after loading."""
    seconds: float
    captions: tuple[str, ...]
    split: str
    piece: str
    facts: dict[str, Any] = field(default_factory=dict)


def load_manifest(path: str | Path, split: str | None = None) -> list[Clip]:
    """Read the clips of a manifest, of all splits or of one.

    Raises ManifestError, naming the file and line, for bad JSON, a missing or mistyped field, audio
    files that do not exist, and a split without clips; FileNotFoundError where there is no manifest.
    """
    path = Path(path).absolute()
    if split is not None and split not in SPLITS:
        raise ManifestError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    clips: list[Clip] = []
    missing: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            clip = _parse(line, path.parent, f"{path}:{number}")
            if split is not None and clip.split != split:
                continue
            if not clip.audio.is_file():
                missing.append(f"{path}:{number}: {clip.audio}")
            clips.append(clip)
    if missing:
        named = "\n  ".join(missing[:NUM_MISSING_NAMED])
        more = len(missing) - NUM_MISSING_NAMED
        raise ManifestError(
            f"{len(missing)} of {len(clips)} audio files are missing:\n  {named}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    if not clips:
        raise ManifestError(f"{path}: no clips" + (f" in split {split!r}" if split else ""))
    return clips


def write_manifest(path: str | Path, clips: Iterable[Clip]) -> Path:
    """Write clips as a manifest, all or nothing; audio paths become relative to it where they can."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for clip in clips:
            audio = Path(clip.audio)
            if audio.is_absolute() and audio.is_relative_to(path.parent):
                audio = audio.relative_to(path.parent)
            row = {
                "audio": audio.as_posix(),
                "seconds": clip.seconds,
                "captions": list(clip.captions),
                "split": clip.split,
                "piece": clip.piece,
                "facts": clip.facts,
            }
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    return path


def _parse(line: str, folder: Path, where: str) -> Clip:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: expected an object, found {type(row).__name__}")
    absent = [
        name for name in ("audio", "seconds", "captions", "split", "piece") if name not in row
    ]
    if absent:
        raise ManifestError(f"{where}: missing {', '.join(absent)}")
    captions, facts, seconds = row["captions"], row.get("facts", {}), row["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ManifestError(f"{where}: seconds must be a positive number, found {seconds!r}")
    if not isinstance(captions, list) or not captions:
        raise ManifestError(f"{where}: captions must be a list of at least one string")
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ManifestError(f"{where}: every caption must be a string that is not empty")
    for name in ("audio", "split", "piece"):
        if not isinstance(row[name], str):
            raise ManifestError(f"{where}: {name} must be a string, found {row[name]!r}")
    if row["split"] not in SPLITS:
        raise ManifestError(f"{where}: split {row['split']!r} is not one of {', '.join(SPLITS)}")
    if not isinstance(facts, dict):
        raise ManifestError(f"{where}: facts must be an object, found {type(facts).__name__}")
    return Clip(
        audio=folder / row["audio"],
        seconds=float(seconds),
        captions=tuple(captions),
        split=row["split"],
        piece=row["piece"],
        facts=facts,
    )
