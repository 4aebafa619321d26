"""The tempo of a clip by librosa's beat tracker, and whether it agrees with a stated one.

Of the tracker only the tempo is used, which it finds before it places any beat; calling that part
alone gives the same number and spares the compilation of the rest (10 s on a fresh install, two
shared CPU cores).
"""

from __future__ import annotations

import numpy as np
import soxr

from musiclm_engine.evaluation.packages import import_library

# 16 ms a frame: on 160 clips of the corpus's training split 53 % of tempi come out within 4 %, 74 %
# at any metrical level, against 49 % and 67 % at librosa's own 22.05 kHz and 512 samples.
SAMPLE_RATE_HZ = 16_000
HOP_SAMPLES = 256
TOLERANCE = 0.04  # of the stated tempo: the custom since Gouyon et al., IEEE TASLP 14(5), 2006
METRICAL_FACTORS = (1.0, 2.0, 3.0, 1 / 2, 1 / 3)


def estimate_tempo(audio: np.ndarray, sample_rate_hz: int) -> float | None:
    """Beats per minute of mono `audio` [samples]; None where no beat is found, as in silence.

    Raises ModuleNotFoundError, naming the install command, where librosa is missing.
    """
    librosa = import_library("librosa")
    audio = soxr.resample(np.asarray(audio, np.float32), sample_rate_hz, SAMPLE_RATE_HZ)
    onsets = librosa.onset.onset_strength(
        y=audio, sr=SAMPLE_RATE_HZ, hop_length=HOP_SAMPLES, aggregate=np.median
    )
    if not onsets.any():
        return None
    tempo = librosa.feature.tempo(onset_envelope=onsets, sr=SAMPLE_RATE_HZ, hop_length=HOP_SAMPLES)
    return float(tempo[0])


def tempo_agrees(
    estimated_bpm: float | None, stated_bpm: float, *, any_metrical_level: bool = False
) -> bool:
    """Whether the estimate lies within 4 % of the stated tempo ("accuracy 1").

    With `any_metrical_level`, twice, three times, half and a third of the stated tempo count too
    ("accuracy 2").
    """
    if not stated_bpm > 0:
        raise ValueError(f"a tempo must be positive; got {stated_bpm}")
    if estimated_bpm is None:
        return False
    factors = METRICAL_FACTORS if any_metrical_level else METRICAL_FACTORS[:1]
    targets = [factor * stated_bpm for factor in factors]
    return any(abs(estimated_bpm - target) <= TOLERANCE * target for target in targets)
