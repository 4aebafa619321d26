"""Manifests: one JSON object a line, each a clip of audio with its captions.

    {"audio": "clips/000000.flac", "seconds": 10.0, "captions": ["slow hymn, organ"],
     "stated": [["instrument", "kind", "tempo_word"]], "split": "train",
     "piece": "bach/bwv10.7.mxl", "facts": {"instrument": "church organ"}}

`audio` is relative to the manifest. `facts` may hold anything; `split` is `train`, `validation` or
`test`. `stated`, which may be left out, says for each caption which facts it states, out of STATABLE.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musiclm_engine.whole_file import whole_file

SPLITS = ("train", "validation", "test")
# What a caption may state. "key" is tonic and mode, "mode" the mode alone; "tempo_bpm" is a number,
# "tempo_word" a word or phrase.
STATABLE = (
    *("instrument", "family", "kind", "key", "mode"),
    *("tempo_bpm", "tempo_word", "metre", "dynamics", "mood"),
)
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
    stated: tuple[frozenset[str], ...] = ()
    """For each caption the facts it states, names out of STATABLE; empty where that is not known."""

    def __post_init__(self) -> None:
        if not self.stated:
            object.__setattr__(self, "stated", (frozenset(),) * len(self.captions))
        if len(self.stated) != len(self.captions):
            raise ValueError(
                f"stated has {len(self.stated)} entries for {len(self.captions)} captions, "
                "want one for each"
            )
        for number, names in enumerate(self.stated):
            for name in sorted(names - set(STATABLE)):
                raise ValueError(
                    f"stated[{number}] names {name!r}, which is not one of {', '.join(STATABLE)}"
                )


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
            }
            if any(clip.stated):
                row["stated"] = [[n for n in STATABLE if n in names] for names in clip.stated]
            row |= {"split": clip.split, "piece": clip.piece, "facts": clip.facts}
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
    stated = row.get("stated", [[]] * len(captions))
    is_lists = isinstance(stated, list) and all(isinstance(names, list) for names in stated)
    if not is_lists or not stated:
        raise ManifestError(
            f"{where}: stated must be a list of lists, one for each caption, found {stated!r}"
        )
    for number, names in enumerate(stated):
        if not all(isinstance(name, str) for name in names):
            raise ManifestError(f"{where}: stated[{number}] must hold names, found {names!r}")
    try:
        return Clip(
            audio=folder / row["audio"],
            seconds=float(seconds),
            captions=tuple(captions),
            split=row["split"],
            piece=row["piece"],
            facts=facts,
            stated=tuple(map(frozenset, stated)),
        )
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from None
