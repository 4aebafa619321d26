"""Losses between waveforms."""

import torch
from torch import Tensor, nn

from musiclm_engine.audio import LogMel

WINDOW_SAMPLES = (64, 128, 256, 512, 1024, 2048)  # SoundStream, section III-D
NUM_MELS = 64


class MultiScaleMelLoss(nn.Module):
    """L1 of mel energies plus alpha times L2 of their logarithms, over six window lengths.

    SoundStream (arXiv 2107.03312), section III-D, after Gritsenko et al. (arXiv 2008.01160):
    windows of s samples, a quarter of s apart, alpha = sqrt(s / 2); averaged over frames.
    """

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            LogMel(
                sample_rate_hz,
                window_ms=1000 * samples / sample_rate_hz,
                hop_ms=1000 * samples / 4 / sample_rate_hz,
                num_mels=NUM_MELS,
            )
            for samples in WINDOW_SAMPLES
        )

    def forward(self, rebuilt: Tensor, target: Tensor) -> Tensor:
        """Both [B, samples] -> a scalar."""
        total = target.new_zeros(())
        for samples, log_mel in zip(WINDOW_SAMPLES, self.scales, strict=True):
            ours, theirs = log_mel(rebuilt) / 2, log_mel(target) / 2  # of power to of magnitude
            energies = (ours.exp() - theirs.exp()).abs().sum(-1).mean()
            logarithms = torch.linalg.vector_norm(ours - theirs, dim=-1).mean()
            total = total + energies + (samples / 2) ** 0.5 * logarithms
        return total / len(WINDOW_SAMPLES)
