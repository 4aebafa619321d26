"""What every codec offers: audio to codes [B, T, Q] and back."""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Codec(nn.Module):
    """A neural audio codec whose latent frames are residually quantised.

    Attributes:
        sample_rate_hz: of the audio it takes and gives, mono.
        hop_length: samples a frame of codes stands for.
        num_quantizers: Q, codes a frame.
        codebook_size: K, values a code can take.
        config: the constructor's arguments, ready for JSON.
    """

    sample_rate_hz: int
    hop_length: int
    num_quantizers: int
    codebook_size: int
    config: dict[str, Any]

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate_hz / self.hop_length

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    @abstractmethod
    def encode(self, audio: Tensor) -> Tensor:
        """audio [B, samples] in [-1, 1] -> codes [B, T, Q] int64; the end is padded to a frame."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, T, q <= Q] int64 -> audio [B, T * hop_length]."""

    def pad_to_frames(self, audio: Tensor) -> Tensor:
        """Refuse what is not [B, samples], then pad with silence to whole frames."""
        if audio.dim() != 2 or audio.shape[1] == 0:
            raise ValueError(f"audio is {tuple(audio.shape)}, wanted [batch, samples >= 1]")
        return F.pad(audio, (0, -audio.shape[1] % self.hop_length))

    def check_codes(self, codes: Tensor) -> None:
        if (
            codes.dim() != 3
            or codes.shape[1] == 0
            or not 1 <= codes.shape[2] <= self.num_quantizers
        ):
            raise ValueError(
                f"codes are {tuple(codes.shape)}, "
                f"wanted [batch, frames >= 1, 1..{self.num_quantizers}]"
            )
        if codes.dtype != torch.int64:
            raise ValueError(f"codes are {codes.dtype}, wanted torch.int64")
