"""What is played at each moment of a clip, from the notes and the instrument in its facts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.audiolm.note_tokenizer import LOWEST_PITCH, NUM_PITCHES, SILENCE, Notes
from musiclm_engine.data.manifest import Clip, ManifestError

GRID_HZ = 200  # moments a second: rendered notes begin some milliseconds off the beat


@dataclass(frozen=True)
class NoteLabels:
    """The scores of N clips on a grid of G moments.

    Attributes:
        melody, bass: [N, G] uint8 classes of `Notes`.
        begun: [N, G + 1] int16: notes that began before each moment.
        instrument: [N] int64 numbers.
    """

    melody: Tensor
    bass: Tensor
    begun: Tensor
    instrument: Tensor

    def to(self, device: torch.device) -> "NoteLabels":
        return NoteLabels(
            self.melody.to(device),
            self.bass.to(device),
            self.begun.to(device),
            self.instrument.to(device),
        )

    def of(self, rows: Tensor, start_seconds: Tensor, frames: int, frame_seconds: float) -> Notes:
        """The labels [B, frames] of stretches of clips; silence where a clip has ended.

        Args:
            rows: [B] int64 clips.
            start_seconds: [B], where in its clip a stretch begins.
            frames: of a stretch.
            frame_seconds: from one frame to the next. A frame's notes are those that sound at its
                centre; it has an onset if a note begins anywhere in it.
        """
        edges = start_seconds[:, None] + frame_seconds * torch.arange(
            frames + 1, device=rows.device
        )
        centres = (edges[:, :-1] + edges[:, 1:]) / 2
        last = self.melody.shape[1] - 1
        moment = (centres * GRID_HZ).round().long()
        inside = moment <= last
        clips, moment = rows[:, None], moment.clamp_max(last)
        begun = self.begun[clips, (edges * GRID_HZ).round().long().clamp_max(last + 1)]
        return Notes(
            melody=torch.where(inside, self.melody[clips, moment].long(), SILENCE),
            bass=torch.where(inside, self.bass[clips, moment].long(), SILENCE),
            onset=(begun[:, 1:] > begun[:, :-1]).long(),
            instrument=self.instrument[clips].expand(-1, frames),
        )


def note_labels(clips: Sequence[Clip], instruments: Sequence[str]) -> NoteLabels:
    """The labels of clips whose facts hold "notes", rows of [onset_s, duration_s, midi pitch], and
    "instrument".

    Args:
        clips: of any lengths.
        instruments: names, in the order of their numbers.

    Raises:
        ManifestError: a clip without these facts, or with others than those named here.
    """
    length = round(max(clip.seconds for clip in clips) * GRID_HZ)
    melody = np.full((len(clips), length), SILENCE, np.uint8)
    bass = np.full((len(clips), length), SILENCE, np.uint8)
    begun = np.zeros((len(clips), length + 1), np.int16)
    numbers = {name: number for number, name in enumerate(instruments)}
    instrument = []
    for row, clip in enumerate(clips):
        name = clip.facts.get("instrument")
        if name not in numbers or "notes" not in clip.facts:
            raise ManifestError(
                f"{clip.audio} has the instrument {name!r} and "
                f"{'' if 'notes' in clip.facts else 'no '}notes, wanted notes "
                f"and one of {', '.join(instruments)}"
            )
        instrument.append(numbers[name])
        for onset, duration, pitch in sorted(clip.facts["notes"], key=lambda note: note[2]):
            note = int(pitch) - LOWEST_PITCH + 1
            if not 1 <= note <= NUM_PITCHES:
                raise ManifestError(f"{clip.audio} has the pitch {pitch}, wanted one of a piano")
            first, end = round(onset * GRID_HZ), round((onset + duration) * GRID_HZ)
            melody[row, first:end] = note  # the highest comes last
            lowest = bass[row, first:end]
            lowest[lowest == SILENCE] = note  # the lowest comes first
            begun[row, first + 1 :] += 1
    return NoteLabels(
        torch.from_numpy(melody),
        torch.from_numpy(bass),
        torch.from_numpy(begun),
        torch.tensor(instrument),
    )
