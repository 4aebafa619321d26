"""Batches of audio crops, each a function of the step's number."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.data.manifest import Clip
from musiclm_engine.training.clip_bank import ClipBank


@dataclass(frozen=True)
class Draw:
    """What a batch is made of.

    Attributes:
        rows: [B] clips, as numbers.
        starts: [B] samples into each.
        chosen: [B] captions, as numbers among their clip's.
        captions: their words.
    """

    rows: np.ndarray
    starts: np.ndarray
    chosen: np.ndarray
    captions: list[str]


@dataclass(frozen=True)
class Crops:
    """Random crops of clips.

    Attributes:
        bank: their audio.
        clips: what else is known of them, in the bank's order.
        seconds: of a crop; a shorter clip is padded with silence.
        batch_size: B.
        seed: of the draw.
    """

    bank: ClipBank
    clips: list[Clip]
    seconds: float
    batch_size: int
    seed: int

    @property
    def samples(self) -> int:
        return round(self.seconds * self.bank.sample_rate_hz)

    def draw(self, step: int) -> Draw:
        """What the batch of a step is made of: it depends on the seed and the step alone."""
        random = np.random.default_rng((self.seed, step))
        rows = random.integers(len(self.clips), size=self.batch_size)
        room = [max(0, self.bank.lengths[row] - self.samples) for row in rows]
        starts = random.integers(np.array(room) + 1)
        of_clip = [self.clips[row].captions for row in rows]
        chosen = random.integers([len(captions) for captions in of_clip])
        captions = [some[n] for some, n in zip(of_clip, chosen, strict=True)]
        return Draw(rows, starts, chosen, captions)

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """Audio [B, samples], where the bank is, and for each crop one of its clip's captions."""
        draw = self.draw(step)
        # One small copy that a GPU need not wait for.
        rows, starts = torch.from_numpy(np.stack([draw.rows, draw.starts])).to(
            self.bank.audio.device, non_blocking=True
        )
        return self.bank.crops(rows, starts, self.samples), draw.captions
