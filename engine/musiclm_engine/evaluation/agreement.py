"""Whether what is heard in clips is what captions say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from musiclm_engine.evaluation.instruments import (
    INSTRUMENT_TAGS,
    OTHER_NAMES,
    UNJUDGED_INSTRUMENTS,
)
from musiclm_engine.evaluation.judges import Judgement, is_audibly_notes
from musiclm_engine.evaluation.tempo import tempo_agrees

PITCH_CLASSES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ACCIDENTALS = {"": 0, "#": 1, "b": -1}
# The key judge knows two modes; a church mode counts as the one that shares its third.
MODES = {
    **dict.fromkeys(("major", "ionian", "lydian", "mixolydian"), "major"),
    **dict.fromkeys(("minor", "aeolian", "dorian", "phrygian", "locrian"), "minor"),
}
COMBINED = ("instrument", "key_exact_or_relative", "tempo_accuracy2")
MEASURES = (
    "instrument",
    "key_exact",
    "key_exact_or_relative",
    "mode",
    "tempo_accuracy1",
    "tempo_accuracy2",
    "combined",
    "audibly_notes",
)


def stated_facts(facts: Mapping[str, Any], stated: Collection[str]) -> dict[str, Any]:
    """Of a clip's facts those that the judges can hear and a caption states.

    Args:
        facts: of the clip.
        stated: names of what the caption says, as in `Clip.stated`: "key" is tonic and mode,
            "mode" the mode alone, "tempo_bpm" a number.
    """
    names = {"instrument", "tempo_bpm", "key", "mode"} & set(stated)
    if "key" in names:
        names.add("mode")
    return {name: facts[name] for name in names if name in facts}


def check_facts(facts: Mapping[str, Any]) -> None:
    """Refuse what the judges do not know.

    Raises:
        ValueError: an instrument, key or mode that is unknown, or a tempo that is not positive.
    """
    _judged_instrument(facts)
    caption_key(facts)
    caption_mode(facts)
    tempo = facts.get("tempo_bpm")
    if tempo is not None and not tempo > 0:
        raise ValueError(f"tempo_bpm must be positive; got {tempo}")


def agreement(
    judgements: Sequence[Judgement], facts: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """How well clip i fits caption j: for each of `MEASURES` a table [clips, captions].

    Args:
        judgements: of the clips.
        facts: what each caption says: `instrument` (a name of `INSTRUMENT_TAGS`, or "church
            organ", which is not judged), `key` ("G", "Bb", "F#") with `mode` ("major", "dorian",
            ...) or `mode` alone, and `tempo_bpm`. What is absent or None is not judged; other
            entries are ignored.

    Returns:
        1 where a clip agrees and 0 where it does not, NaN in the columns of captions that do not
        say it. "instrument": its log-odds, standardised over the clips, are the highest. "combined":
        the mean over what the caption says of `COMBINED`. "audibly_notes" asks no caption.
    """
    tables = {name: np.full((len(judgements), len(facts)), np.nan) for name in MEASURES}
    captioned = [_judged_instrument(caption) for caption in facts]
    instruments = [name for name in INSTRUMENT_TAGS if name in captioned]
    heard = _standardised_log_odds(judgements, instruments)
    for j, caption in enumerate(facts):
        name, key, mode = captioned[j], caption_key(caption), caption_mode(caption)
        if name is not None:
            tables["instrument"][:, j] = heard.argmax(1) == instruments.index(name)
        if key is not None:
            either = (key, _relative_key(key))
            tables["key_exact"][:, j] = [clip.key == key for clip in judgements]
            tables["key_exact_or_relative"][:, j] = [clip.key in either for clip in judgements]
        if mode is not None:
            tables["mode"][:, j] = [
                clip.key is not None and clip.key[1] == mode for clip in judgements
            ]
        tempo = caption.get("tempo_bpm")
        if tempo is not None:
            for measure, any_level in (("tempo_accuracy1", False), ("tempo_accuracy2", True)):
                tables[measure][:, j] = [
                    tempo_agrees(clip.tempo_bpm, float(tempo), any_metrical_level=any_level)
                    for clip in judgements
                ]
    parts = np.stack([tables[name] for name in COMBINED])
    is_said = ~np.isnan(parts)
    tables["combined"] = np.where(is_said, parts, 0).sum(0) / np.where(
        is_said.any(0), is_said.sum(0), np.nan
    )
    tables["audibly_notes"][:] = np.array([[is_audibly_notes(c.activity)] for c in judgements])
    return tables


def caption_key(facts: Mapping[str, Any]) -> tuple[int, str] | None:
    """The (tonic, "major" or "minor") that a caption states; None without `key` or `mode`."""
    key, mode = facts.get("key"), caption_mode(facts)
    if key is None or mode is None:
        return None
    if key[:1] not in PITCH_CLASSES or key[1:] not in ACCIDENTALS:
        raise ValueError(f"key must be a letter A-G with at most one # or b; got {key!r}")
    return (PITCH_CLASSES[key[0]] + ACCIDENTALS[key[1:]]) % 12, mode


def caption_mode(facts: Mapping[str, Any]) -> str | None:
    """ "major" or "minor", as the third of the stated mode; None without `mode`."""
    mode = facts.get("mode")
    if mode is None:
        return None
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    return MODES[mode]


def _judged_instrument(facts: Mapping[str, Any]) -> str | None:
    name: Any = facts.get("instrument")
    name = OTHER_NAMES.get(name, name)
    if name is None or name in UNJUDGED_INSTRUMENTS:
        return None
    if name not in INSTRUMENT_TAGS:
        known = ", ".join([*INSTRUMENT_TAGS, *OTHER_NAMES, *UNJUDGED_INSTRUMENTS])
        raise ValueError(f"instrument must be one of {known}; got {name!r}")
    return str(name)


def _relative_key(key: tuple[int, str]) -> tuple[int, str]:
    tonic, mode = key
    return ((tonic + 9) % 12, "minor") if mode == "major" else ((tonic + 3) % 12, "major")


def _standardised_log_odds(judgements: Sequence[Judgement], instruments: list[str]) -> np.ndarray:
    """Log-odds [clips, instruments], each column of mean 0 and deviation 1 over all clips.

    Tags differ in base rate and in how far they swing; standardised, they compare. A column without
    spread gives 0.
    """
    log_odds = np.array(
        [[clip.instrument_log_odds[name] for name in instruments] for clip in judgements]
    ).reshape(len(judgements), len(instruments))
    centred = log_odds - log_odds.mean(0)
    deviation = centred.std(0)
    return centred / np.where(deviation > 1e-9, deviation, np.inf)
