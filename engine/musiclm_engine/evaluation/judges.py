"""The judges together: what they hear in a clip, knowing nothing of its caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from musiclm_engine.evaluation.instruments import instrument_log_odds
from musiclm_engine.evaluation.notes import (
    NoteActivity,
    NoteTranscriber,
    estimate_key,
    note_activity,
)
from musiclm_engine.evaluation.tagger import MusicTagger
from musiclm_engine.evaluation.tempo import estimate_tempo

# Raise it when a judge hears something else in the same audio: judgements are kept on disk.
JUDGES_VERSION = 1

# A clip is audibly notes, rather than noise or silence, from these on. It is a low bar: all of 160
# true clips pass (the least have 0.77 and 1.1), white noise and clips cut in 20 or 80 ms pieces
# and shuffled all fail, but a smear of the right pitches (a clip with random phases) passes.
MIN_SOUNDING_SHARE = 0.5
MIN_NOTES_PER_SECOND = 0.5


@dataclass(frozen=True)
class Judgement:
    """What is heard in one clip.

    Attributes:
        instrument_log_odds: of every instrument in `INSTRUMENT_TAGS`.
        key: tonic (0 is C) and "major" or "minor"; None where no pitch class stands out.
        tempo_bpm: None where no beat is found.
        activity: how much is played.
        embedding: [patches, 200], the tagger's layer before the tags, for each 3 s.
    """

    instrument_log_odds: Mapping[str, float]
    key: tuple[int, str] | None
    tempo_bpm: float | None
    activity: NoteActivity
    embedding: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"embedding": self.embedding.tolist()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `to_json` gave, exactly."""
        key = content["key"]
        return cls(
            instrument_log_odds=content["instrument_log_odds"],
            key=None if key is None else (key[0], key[1]),
            tempo_bpm=content["tempo_bpm"],
            activity=NoteActivity(**content["activity"]),
            embedding=np.array(content["embedding"]),
        )


class Judges:
    """The networks and the tempo tracker, loaded once; call it with a clip for its `Judgement`.

    Attributes:
        transcribe: hears notes.
        tag: hears instruments, and gives the embedding.

    Raises ModuleNotFoundError, naming the install command, where one of their packages is missing.
    """

    def __init__(self) -> None:
        self.transcribe = NoteTranscriber()
        self.tag = MusicTagger()

    def __call__(self, audio: np.ndarray, sample_rate_hz: int) -> Judgement:
        """Judges mono `audio` [samples], float32 in [-1, 1]."""
        posteriors = self.transcribe(audio, sample_rate_hz)
        tagging = self.tag(audio, sample_rate_hz)
        return Judgement(
            instrument_log_odds(tagging),
            estimate_key(posteriors.notes),
            estimate_tempo(audio, sample_rate_hz),
            note_activity(posteriors),
            tagging.embedding,
        )


def is_audibly_notes(activity: NoteActivity) -> bool:
    """Whether enough notes are found, and sound for enough of the clip, to call it playing."""
    return (
        activity.sounding_share >= MIN_SOUNDING_SHARE
        and activity.notes_per_second >= MIN_NOTES_PER_SECOND
    )
