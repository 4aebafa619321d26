"""Held-out clips whose music a training piece of another name holds: collections share tunes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from musiclm_engine.data.manifest import Clip

PHRASE_STEPS = 14  # steps of the melody that are compared, in any key and at any tempo
KNOWN_SHARE = 0.5  # of a clip's phrases, from which on its music counts as known
STRUM_SECONDS = 0.06  # notes that begin within it begin together


def without_known(held_out: Sequence[Clip], trained: Sequence[Clip]) -> list[Clip]:
    """Those of `held_out` that share fewer than half of their phrases with the clips of training.

    A clip of fewer than 15 notes in its melody, or whose facts hold no "notes", stays.
    """
    known = {phrase for clip in trained for phrase in _phrases(clip)}
    kept = []
    for clip in held_out:
        phrases = _phrases(clip)
        if not phrases or len(phrases & known) < KNOWN_SHARE * len(phrases):
            kept.append(clip)
    return kept


def _phrases(clip: Clip) -> set[bytes]:
    """All runs of `PHRASE_STEPS` steps in the melody."""
    steps = np.diff(_melody(clip)).astype(np.int8)
    return {
        steps[first : first + PHRASE_STEPS].tobytes()
        for first in range(len(steps) - PHRASE_STEPS + 1)
    }


def _melody(clip: Clip) -> np.ndarray:
    """Pitches of the notes above which none sounds when they begin, in order of time."""
    notes = np.array(sorted(clip.facts.get("notes", [])), float).reshape(-1, 3)
    onset, end, pitch = notes[:, 0], notes[:, 0] + notes[:, 1], notes[:, 2]
    moment = onset[:, None] + STRUM_SECONDS
    is_covered = (onset <= moment) & (moment < end) & (pitch > pitch[:, None])
    return pitch[~is_covered.any(1)]
