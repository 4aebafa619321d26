"""The scores of the built-in corpus: chorales by J. S. Bach and fiddle tunes of three old books.

`scores/*.jsonl.gz` holds a piece a line: {"id", "title", "key", "metre", "rhythm", "tempo", "pickup",
"parts"}. A part is flat: for each note, ticks since the previous onset, ticks it lasts, MIDI pitch,
at 480 ticks a quarter note. `pickup` is the ticks before the first bar line. Where they come from
and who typed them in is in `NOTICE`.
"""

import gzip
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

TICKS_PER_QUARTER = 480
COMPOUND_METRES = ("6/8", "9/8", "12/8")

# The rhythm field of a tune, lower case, and what to call it.
_KINDS = {
    "reel": "reel",
    "hornpipe": "hornpipe",
    "jig": "jig",
    "double jig": "jig",
    "slipjig": "slip jig",
    "slip jig": "slip jig",
    "strathspey": "strathspey",
    "clog": "clog",
    "air": "air",
    "highland fling": "highland fling",
    "fling": "highland fling",
    "waltz": "waltz",
    "march": "march",
    "slide": "slide",
    "gavotte": "gavotte",
    "chorale": "chorale",
}
_TITLE_KIND = re.compile(
    r"\b(reel|hornpipe|jig|slip jig|strathspey|clog|waltz|march|minuet|polka|gavotte)\W*$",
    re.IGNORECASE,
)
# What a title says wherever it stands, when neither of the above says more.
_TITLE_WORDS = {
    re.compile(pattern, re.IGNORECASE): kind
    for pattern, kind in (
        (r"\bquick ?step\b", "quickstep"),
        (r"\bstrathsy\b", "strathspey"),
        (r"\blament(ation)?\b", "lament"),
        (r"^planxty\b", "planxty"),
        (r"\bmarch\b", "march"),
        (r"\bair\W*$", "air"),
        (r"^\W*allemand[ae]\b", "allemande"),
        (r"\blullaby\b", "lullaby"),
    )
}
_KEY = re.compile(r"^([A-G])([#b]?)\s*([A-Za-z]*)$")
_MODES = {
    "": "major",
    "maj": "major",
    "ion": "major",
    "m": "minor",
    "min": "minor",
    "aeo": "minor",
    "dor": "dorian",
    "mix": "mixolydian",
    "lyd": "lydian",
    "phr": "phrygian",
}
_PITCH_CLASS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
# Fewest sharps or flats: flat thirds favour sharps where the major scale would be flat.
_MAJOR_NAMES = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
_MINOR_NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B")


class Note(NamedTuple):
    onset_quarters: float
    duration_quarters: float
    pitch: int


@dataclass(frozen=True)
class Piece:
    """A score as notes, with what its source says about it; None where the source says nothing."""

    id: str
    title: str
    kind: str
    """`chorale`, a tune's rhythm (`reel`, `slip jig`, …), or `folk tune`."""
    parts: tuple[tuple[Note, ...], ...]
    tonic: int | None
    """Pitch class of the key note."""
    mode: str | None
    metre: str
    pickup_quarters: float

    @property
    def bar_quarters(self) -> float:
        above, below = self.metre.split("/")
        return int(above) * 4 / int(below)

    @property
    def beat_quarters(self) -> float:
        """What a listener taps and tempo counts: a dotted quarter in compound metres."""
        return 1.5 if self.metre in COMPOUND_METRES else 1.0

    @property
    def quarters(self) -> float:
        """From the first onset to the last note's end."""
        return max(n.onset_quarters + n.duration_quarters for part in self.parts for n in part)

    @property
    def origin(self) -> str | None:
        """`Irish` for the tunes of O'Neill's Music of Ireland; the other books mix their sources."""
        return "Irish" if self.id.startswith("oneills1850/") else None

    @property
    def is_chorale(self) -> bool:
        return self.kind == "chorale"


@cache
def load_pieces() -> tuple[Piece, ...]:
    """Every piece of the built-in corpus, chorales first."""
    pieces: list[Piece] = []
    for name in ("chorales", "tunes"):
        packed = (files(__package__) / "scores" / f"{name}.jsonl.gz").read_bytes()
        for line in gzip.decompress(packed).decode("utf-8").splitlines():
            pieces.append(_piece(json.loads(line)))
    return tuple(pieces)


def parse_key(text: str | None) -> tuple[int, str] | None:
    """Tonic pitch class and mode of a key field such as `Am`, `Ador`, `G Mixolydian`, `Bb`.

    None where the field is absent or names no mode known here (`HP`, `Bn`).
    """
    match = _KEY.match((text or "").strip())
    if match is None:
        return None
    letter, accidental, word = match.groups()
    mode = "m" if word == "m" else word[:3].lower()
    if word == "M":
        mode = "maj"
    if mode not in _MODES:
        return None
    return (_PITCH_CLASS[letter] + {"#": 1, "b": -1, "": 0}[accidental]) % 12, _MODES[mode]


def tonic_name(pitch_class: int, mode: str) -> str:
    """The usual spelling of a key note: `Bb` major but `C#` minor."""
    sharp_side = mode in ("minor", "dorian", "phrygian")
    return (_MINOR_NAMES if sharp_side else _MAJOR_NAMES)[pitch_class % 12]


def kind_of(rhythm: str | None, title: str) -> str:
    """What to call a tune: its rhythm field, else what its title says it is, else `folk tune`."""
    known = _KINDS.get((rhythm or "").strip().lower())
    if known is not None:
        return known
    match = _TITLE_KIND.search(title)
    if match:
        return match.group(1).lower()
    return next((kind for word, kind in _TITLE_WORDS.items() if word.search(title)), "folk tune")


def _piece(row: dict[str, Any]) -> Piece:
    key = parse_key(row["key"])
    return Piece(
        id=row["id"],
        title=row["title"],
        kind=kind_of(row["rhythm"], row["title"]),
        parts=tuple(_notes(part) for part in row["parts"]),
        tonic=None if key is None else key[0],
        mode=None if key is None else key[1],
        metre=row["metre"],
        pickup_quarters=row["pickup"] / TICKS_PER_QUARTER,
    )


def _notes(flat: list[int]) -> tuple[Note, ...]:
    notes, tick = [], 0
    for gap, length, pitch in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        tick += gap
        notes.append(Note(tick / TICKS_PER_QUARTER, length / TICKS_PER_QUARTER, pitch))
    return tuple(notes)
