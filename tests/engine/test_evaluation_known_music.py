"""Tunes that stand in two collections under two names."""

import numpy as np

from musiclm_engine.data.manifest import Clip
from musiclm_engine.evaluation.known_music import without_known

RNG = np.random.default_rng(0)
TUNE, OTHER = RNG.integers(60, 80, size=(2, 40)).tolist()


def clip(pitches: list[int], beat: float = 0.3, below: int | None = None) -> Clip:
    notes = [[beat * n, beat, pitch] for n, pitch in enumerate(pitches)]
    if below is not None:  # a lower voice, each note begun a little later and held
        notes += [[beat * n + 0.02, 3 * beat, pitch - below] for n, pitch in enumerate(pitches)]
    return Clip("x.wav", 10.0, ("x",), "test", "x", {"notes": notes})


def test_a_tune_is_known_in_any_key_at_any_tempo_and_with_a_bass() -> None:
    same = [
        clip(TUNE),
        clip([pitch - 7 for pitch in TUNE]),
        clip(TUNE, beat=0.2),
        clip(TUNE, below=30),
        clip(TUNE[10:30]),
        clip(TUNE[:30] + OTHER[:10]),
    ]
    assert without_known(same, [clip(OTHER), clip(TUNE)]) == []


def test_what_differs_or_is_too_short_to_tell_stays() -> None:
    upside_down = [140 - pitch for pitch in TUNE]
    others = [clip(OTHER), clip(upside_down), clip(TUNE[:20] + OTHER[:20]), clip(TUNE[:14])]
    others.append(Clip("x.wav", 10.0, ("x",), "test", "x", {}))
    assert without_known(others, [clip(TUNE)]) == others
