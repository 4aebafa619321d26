"""A tempo as a token, and time counted in its beats."""

import math

import torch
from torch import Tensor, nn

SLOWEST_BPM = 40.0
FASTEST_BPM = 240.0
STEPS_AN_OCTAVE = 40  # 1.7 %: a bar apart, half a step is a hundredth of a bar
NUM_TEMPI = 1 + round(STEPS_AN_OCTAVE * math.log2(FASTEST_BPM / SLOWEST_BPM))
TICKS_A_BEAT = 48  # a frame of 40 ms is more than one at the slowest tempo


class BeatClock(nn.Module):
    """Where the frames of a sequence stand in beats of its tempo, and the tempo as its first token.

    Counted in frames a rhythm is another one at each tempo; counted in beats it is the same one,
    so that what is learned at one tempo holds at all. Moments are whole ticks of a beat.

    Args:
        frame_rate_hz: frames of the sequence a second.
        dim: D, of the embedding of a tempo.
    """

    def __init__(self, frame_rate_hz: float, dim: int) -> None:
        super().__init__()
        if not 0 < frame_rate_hz < math.inf:
            raise ValueError(f"frame_rate_hz is {frame_rate_hz}, wanted a number above 0")
        self.frame_rate_hz = frame_rate_hz
        self.embedding = nn.Embedding(NUM_TEMPI, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def span(self, frames: int) -> int:
        """Moments that this many frames span at the fastest tempo."""
        fastest = torch.tensor([NUM_TEMPI - 1])
        return int(self.moments(torch.tensor([frames]), fastest))

    def moments(self, frames: Tensor, tempo: Tensor) -> Tensor:
        """frames [T] at tempi [B] of tokens -> [B, T] int64."""
        ticks = bpm_of(tempo) * TICKS_A_BEAT / (60 * self.frame_rate_hz)  # of a frame
        return torch.round(frames * ticks[:, None]).long()


def bpm_of(tempo: Tensor) -> Tensor:
    """Beats per minute that tokens stand for, float64."""
    return SLOWEST_BPM * torch.exp2(tempo.double() / STEPS_AN_OCTAVE)


def tempo_tokens(bpm: Tensor) -> Tensor:
    """The nearest token of each tempo, int64; those outside the range are taken octaves nearer."""
    octaves = torch.log2(bpm.double() / SLOWEST_BPM)
    top = math.log2(FASTEST_BPM / SLOWEST_BPM)
    octaves = octaves - octaves.floor().clamp(max=0) - (octaves - top).ceil().clamp(min=0)
    return torch.round(octaves * STEPS_AN_OCTAVE).long()
