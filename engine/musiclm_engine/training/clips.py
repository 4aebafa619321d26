"""Batches of audio crops, each a function of the step's number."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_engine.audio import load_audio
from musiclm_engine.data.manifest import Clip


@dataclass(frozen=True)
class Crops:
    """Random crops of clips.

    Attributes:
        clips: to draw from.
        seconds: of a crop; a shorter clip is padded with silence.
        batch_size: B.
        sample_rate_hz: to load at.
        seed: of the draw.
    """

    clips: list[Clip]
    seconds: float
    batch_size: int
    sample_rate_hz: int
    seed: int

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """Audio [B, samples] and, for each crop, one of its clip's captions."""
        random = np.random.default_rng((self.seed, step))
        rows, captions = [], []
        for index in random.integers(len(self.clips), size=self.batch_size):
            clip = self.clips[index]
            start = random.uniform(0, max(0.0, clip.seconds - self.seconds))
            rows.append(load_crop(clip, start, self.seconds, self.sample_rate_hz))
            captions.append(clip.captions[random.integers(len(clip.captions))])
        return torch.stack(rows), captions


def load_crop(clip: Clip, start_seconds: float, seconds: float, sample_rate_hz: int) -> Tensor:
    """[round(seconds * sample_rate_hz)] samples of a clip, silence where it has ended."""
    samples = round(seconds * sample_rate_hz)
    audio = load_audio(clip.audio, sample_rate_hz, offset_seconds=start_seconds, seconds=seconds)[
        :samples
    ]
    return F.pad(audio, (0, samples - len(audio)))
