"""What of its clips a codec keeps, as the judges hear it: the notes, and how the sound is tagged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.audio import load_audio
from musiclm_engine.codec import Codec
from musiclm_engine.components import load_component
from musiclm_engine.data.manifest import Clip, load_manifest
from musiclm_engine.evaluation.judges import Judges
from musiclm_engine.evaluation.notes import HOP_SAMPLES, SAMPLE_RATE_HZ, detect_notes

ONSET_TOLERANCE_SECONDS = 0.06

Note = tuple[int, int, int]  # first frame, end frame, MIDI pitch


def judge_codec(
    codec: Codec,
    clips: Sequence[Clip],
    levels: Sequence[int],
    *,
    judges: Judges | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Notes and tags of clips, beside those of the same clips coded and rebuilt.

    Args:
        codec: in evaluation mode.
        clips: of which no part of the codec was trained.
        levels: how many of its levels to rebuild from, each a row of the result.
        judges: `Judges()` if not given.
        on_progress: called with (clips done, clips in all).

    Returns:
        what `json.dumps` takes: "num_clips", "num_notes" of all originals, "tag_correlation_of_others"
        (each original beside the next: what no codec at all would reach) and, under "levels", rows of
            levels           codebooks used
            kbit_per_second
            note_f1          `onset_f1` of the notes heard, mean over the clips that have any
            tag_correlation  Pearson, over the tagger's 50 tags, of their log-odds in the original
                             and in the rebuilt clip; mean over clips

    Raises:
        ValueError: fewer than two clips, or levels that the codec does not have.
    """
    if len(clips) < 2:
        raise ValueError(f"there are {len(clips)} clips to judge a codec on, wanted at least 2")
    if not levels or not all(1 <= q <= codec.num_quantizers for q in levels):
        raise ValueError(f"levels are {list(levels)}, the codec has 1 to {codec.num_quantizers}")
    judges = judges or Judges()
    device = next(codec.parameters()).device
    originals = []
    f1: dict[int, list[float]] = {q: [] for q in levels}
    correlation: dict[int, list[float]] = {q: [] for q in levels}
    num_notes = 0
    for done, clip in enumerate(clips, start=1):
        audio = load_audio(clip.audio, codec.sample_rate_hz)
        notes, tags = _hear(judges, audio, codec.sample_rate_hz)
        originals.append(tags)
        num_notes += len(notes)
        codes = codec.encode(audio[None].to(device))
        for q in levels:
            rebuilt = rebuild(codec, codes[:, :, :q], len(audio))
            found, heard = _hear(judges, rebuilt, codec.sample_rate_hz)
            score = onset_f1(notes, found)
            if score is not None:
                f1[q].append(score)
            correlation[q].append(float(np.corrcoef(tags, heard)[0, 1]))
        if on_progress is not None:
            on_progress(done, len(clips))
    kbit_a_level = codec.frame_rate_hz * math.log2(codec.codebook_size) / 1000
    others = [*originals[1:], originals[0]]
    return {
        "num_clips": len(clips),
        "num_notes": num_notes,
        "tag_correlation_of_others": float(
            np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(originals, others, strict=True)])
        ),
        "levels": [
            {
                "levels": q,
                "kbit_per_second": q * kbit_a_level,
                "note_f1": float(np.mean(f1[q])) if f1[q] else None,
                "tag_correlation": float(np.mean(correlation[q])),
            }
            for q in levels
        ],
    }


def evaluate_codec(
    stem: Path,
    manifest: Path,
    *,
    clips: int,
    seed: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """`judge_codec` of a codec on disk, at all its levels, on clips of the validation split.

    Args:
        stem: of its files, as `load_component` takes it.
        manifest: with a validation split.
        clips: how many; seed: of their choice.
        device: to run the codec on.

    Raises:
        CheckpointError: no codec there. ValueError: fewer clips in the split.
        ModuleNotFoundError: a judge's package is missing.
    """
    judges = Judges()
    codec = load_component("codec", stem).to(device)
    held_out = load_manifest(manifest, "validation")
    if len(held_out) < clips:
        raise ValueError(
            f"clips is {clips}, {manifest} has {len(held_out)} in its validation split"
        )
    order = np.random.default_rng(seed).permutation(len(held_out))[:clips]
    return judge_codec(
        codec,
        [held_out[index] for index in order],
        range(1, codec.num_quantizers + 1),
        judges=judges,
        on_progress=on_progress,
    )


def rebuild(codec: Codec, codes: Tensor, samples: int) -> Tensor:
    """Audio [samples] of the codes [1, T, q] of one clip."""
    with torch.inference_mode():
        return codec.decode(codes)[0, :samples].cpu()


def onset_f1(reference: Sequence[Note], found: Sequence[Note]) -> float | None:
    """F1 of the notes `found`, each of which may stand for one of `reference`: of the same pitch,
    starting within 60 ms of it. Ends do not count. None where neither list holds a note.

    Pairing the earliest with the earliest gives as many pairs as can be, for the tolerance is the
    same for all notes of a pitch.
    """
    if not reference and not found:
        return None
    frame_seconds = HOP_SAMPLES / SAMPLE_RATE_HZ
    pairs = 0
    for pitch in {note[2] for note in reference} & {note[2] for note in found}:
        starts = sorted(note[0] for note in reference if note[2] == pitch)
        others = sorted(note[0] for note in found if note[2] == pitch)
        i = j = 0
        while i < len(starts) and j < len(others):
            late_seconds = (others[j] - starts[i]) * frame_seconds
            if abs(late_seconds) <= ONSET_TOLERANCE_SECONDS:
                pairs, i, j = pairs + 1, i + 1, j + 1
            elif late_seconds > 0:
                i += 1
            else:
                j += 1
    return 2 * pairs / (len(reference) + len(found))


def _hear(judges: Judges, audio: Tensor, sample_rate_hz: int) -> tuple[list[Note], np.ndarray]:
    samples = audio.numpy()
    return (
        detect_notes(judges.transcribe(samples, sample_rate_hz)),
        judges.tag(samples, sample_rate_hz).all_log_odds,
    )
