"""SpecAugment's masks (arXiv 1904.08779, section 2), a different one for each row."""

import torch
from torch import Tensor


def mask_spans(spectrogram: Tensor, dim: int, max_width: int, extents: Tensor) -> Tensor:
    """Replaces one random span of each row along `dim` by the row's mean value.

    Args:
        spectrogram: (B, frames, F).
        dim: 1 masks frames, 2 masks mel bins.
        max_width: widths are uniform in [0, max_width], and at most half of the extent.
        extents: (B,), how far along `dim` each row is filled; the span lies within.
    """
    if max_width == 0:
        return spectrogram
    size = spectrogram.shape[dim]
    random = torch.rand(2, len(spectrogram), device=spectrogram.device)
    widths = random[0] * (extents / 2).clamp(max=max_width)
    starts = random[1] * (extents - widths)
    positions = torch.arange(size, device=spectrogram.device) + 0.5
    masked = (positions >= starts[:, None]) & (positions < (starts + widths)[:, None])  # [B, size]
    masked = masked[:, :, None] if dim == 1 else masked[:, None, :]
    return torch.where(masked, spectrogram.mean(dim=(1, 2), keepdim=True), spectrogram)
