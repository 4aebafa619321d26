"""Which notes sound: basic-pitch's network, and the key and the amount of playing read from it.

The network and its framing are basic-pitch 0.4.0's (Spotify, Apache-2.0; Bittner et al., ICASSP
2022): `inference.py` for the windows, `note_creation.py` for what counts as a note. It runs from
the ONNX file in the wheel, so TensorFlow is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import soxr

from musiclm_engine.evaluation.packages import import_library, wheel_folder

SAMPLE_RATE_HZ = 22_050
HOP_SAMPLES = 256
WINDOW_SAMPLES = 2 * SAMPLE_RATE_HZ - HOP_SAMPLES
OVERLAP_FRAMES = 30  # half of it is cut from each side of a window's output
FRAMES_PER_SECOND = SAMPLE_RATE_HZ // HOP_SAMPLES
LOWEST_MIDI_PITCH = 21
NUM_PITCHES = 88

ONSET_THRESHOLD, NOTE_THRESHOLD = 0.5, 0.3  # basic-pitch's defaults
SHORTEST_NOTE_FRAMES = 11  # 128 ms, basic-pitch's default

# Temperley, The Cognition of Basic Musical Structures (2001), table 7.1, from the tonic upwards.
MAJOR_PROFILE = (5.0, 2.0, 3.5, 2.0, 4.5, 4.0, 2.0, 4.5, 2.0, 3.5, 1.5, 4.0)
MINOR_PROFILE = (5.0, 2.0, 3.5, 4.5, 2.0, 4.0, 2.0, 4.5, 3.5, 2.0, 1.5, 4.0)


@dataclass(frozen=True)
class NotePosteriors:
    """Probabilities [frames, 88] that a pitch sounds, and that it starts; 86 frames a second."""

    notes: np.ndarray
    onsets: np.ndarray


@dataclass(frozen=True)
class NoteActivity:
    """How much is audibly played: notes found, and the share of frames in which one sounds."""

    num_notes: int
    notes_per_second: float
    sounding_share: float


class NoteTranscriber:
    """basic-pitch's network in onnxruntime, on `num_threads` CPU threads.

    Raises ModuleNotFoundError, naming the install command, where basic-pitch or onnxruntime is
    missing.
    """

    def __init__(self, num_threads: int = 1) -> None:
        model = wheel_folder("basic_pitch") / "saved_models/icassp_2022/nmp.onnx"
        onnxruntime = import_library("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        self._session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, audio: np.ndarray, sample_rate_hz: int) -> NotePosteriors:
        """Posteriors of mono `audio` [samples], float32 in [-1, 1].

        Raises ValueError if it is not 1-D, or empty.
        """
        if audio.ndim != 1 or not len(audio):
            raise ValueError(f"audio must be mono, shape (samples,); got {audio.shape}")
        audio = soxr.resample(np.asarray(audio, np.float32), sample_rate_hz, SAMPLE_RATE_HZ)
        overlap_samples = OVERLAP_FRAMES * HOP_SAMPLES
        hop_samples = WINDOW_SAMPLES - overlap_samples
        padded = np.concatenate([np.zeros(overlap_samples // 2, np.float32), audio])
        starts = range(0, len(padded), hop_samples)
        padded = np.pad(padded, (0, starts[-1] + WINDOW_SAMPLES - len(padded)))
        windows = np.stack([padded[start : start + WINDOW_SAMPLES] for start in starts])
        notes, onsets = self._session.run(
            ["StatefulPartitionedCall:1", "StatefulPartitionedCall:2"],
            {"serving_default_input_2:0": windows[:, :, None]},
        )
        num_frames = len(audio) * FRAMES_PER_SECOND // SAMPLE_RATE_HZ
        half = OVERLAP_FRAMES // 2
        return NotePosteriors(
            notes[:, half:-half].reshape(-1, NUM_PITCHES)[:num_frames],
            onsets[:, half:-half].reshape(-1, NUM_PITCHES)[:num_frames],
        )


def estimate_key(notes: np.ndarray) -> tuple[int, str] | None:
    """The (tonic, mode) whose profile best fits the pitch classes of `notes` [frames, 88].

    The fit is the correlation of Temperley's profile with the summed posteriors of the notes that
    sound. tonic: 0 is C, 11 is B; mode: "major" or "minor". None where all pitch classes sound
    alike, as where none does.
    """
    # Summing the faint posteriors too costs 6 points of exact keys (160 clips of the corpus).
    loudness = np.where(notes >= NOTE_THRESHOLD, notes, 0).sum(0, dtype=float)
    histogram = np.zeros(12)
    np.add.at(histogram, (np.arange(NUM_PITCHES) + LOWEST_MIDI_PITCH) % 12, loudness)
    if np.ptp(histogram) <= 1e-9 * histogram.max():
        return None
    correlations = {
        (tonic, mode): np.corrcoef(histogram, np.roll(profile, tonic))[0, 1]
        for mode, profile in (("major", MAJOR_PROFILE), ("minor", MINOR_PROFILE))
        for tonic in range(12)
    }
    return max(correlations, key=lambda key: correlations[key])


def detect_notes(posteriors: NotePosteriors) -> list[tuple[int, int, int]]:
    """Notes as (first frame, end frame, MIDI pitch), in order of time.

    A note is a run of at least 11 frames in which its pitch's posterior stays at 0.3 or more; a
    peak of the onset posterior of 0.5 or more starts a new one within a run. Unlike basic-pitch,
    which follows notes from their onsets, this also counts the soft entries of choir and strings.
    """
    notes, onsets = posteriors.notes, posteriors.onsets
    sounding = np.pad(notes >= NOTE_THRESHOLD, ((1, 1), (0, 0)))
    peaks = np.zeros(onsets.shape, bool)
    peaks[1:-1] = (onsets[1:-1] > onsets[:-2]) & (onsets[1:-1] >= onsets[2:])
    peaks &= onsets >= ONSET_THRESHOLD
    found = []
    for pitch in np.flatnonzero(sounding.any(0)):
        steps = np.diff(sounding[:, pitch].astype(np.int8))
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        for start, end in zip(starts, ends, strict=True):
            inner = start + 1 + np.flatnonzero(peaks[start + 1 : end, pitch])
            cuts = [start, *inner, end]
            found += [
                (int(a), int(b), int(pitch) + LOWEST_MIDI_PITCH)
                for a, b in pairwise(cuts)
                if b - a >= SHORTEST_NOTE_FRAMES
            ]
    return sorted(found)


def note_activity(posteriors: NotePosteriors) -> NoteActivity:
    """The notes of `detect_notes`, counted, and the share of frames in which one of them sounds."""
    found = detect_notes(posteriors)
    num_frames = len(posteriors.notes)
    covered = np.zeros(num_frames, bool)
    for start, end, _ in found:
        covered[start:end] = True
    seconds = max(num_frames, 1) / FRAMES_PER_SECOND
    return NoteActivity(len(found), len(found) / seconds, float(covered.sum()) / max(num_frames, 1))
