"""A waveform from STFT magnitudes alone: a phase that fits, found in two steps.

Single-pass spectrogram inversion (Beauregard, Harish and Wyse, DSP 2015) lets every spectral peak
advance its phase by its own frequency, which is right for steady tones. A few rounds of fast
Griffin-Lim (Perraudin, Balazs and Soendergaard, WASPAA 2013) then make frames agree. Nothing is
random, so equal magnitudes give equal samples.
"""

import math

import torch
from torch import Tensor

MOMENTUM = 0.99  # Perraudin et al., section 4: the best of those they tried


def waveform_from_magnitude(
    magnitude: Tensor, window: Tensor, hop_length: int, *, num_iterations: int = 16
) -> Tensor:
    """Find audio whose STFT has about this magnitude.

    Args:
        magnitude: [B, n_fft / 2 + 1, T], of a centred STFT.
        window: [n_fft].
        hop_length: samples between frames.
        num_iterations: rounds of Griffin-Lim after the first guess.

    Returns:
        [B, (T - 1) * hop_length] audio.
    """
    n_fft = len(window)
    spectrum = torch.polar(magnitude, _peak_phase(magnitude, n_fft, hop_length))
    previous = torch.zeros_like(spectrum)
    for _ in range(num_iterations):
        audio = torch.istft(spectrum, n_fft, hop_length, window=window)
        consistent = torch.stft(
            audio, n_fft, hop_length, window=window, return_complex=True, pad_mode="constant"
        )
        accelerated = consistent + MOMENTUM * (consistent - previous)
        previous = consistent
        spectrum = magnitude * accelerated / accelerated.abs().clamp_min(1e-8)
    return torch.istft(spectrum, n_fft, hop_length, window=window)


def _peak_phase(magnitude: Tensor, n_fft: int, hop_length: int) -> Tensor:
    """Phases [B, bins, T] in which each peak turns at its interpolated frequency."""
    left, middle, right = magnitude[:, :-2], magnitude[:, 1:-1], magnitude[:, 2:]
    is_peak = (middle > left) & (middle >= right)
    # The parabola through a peak and its neighbours has its top this far from the middle bin.
    curvature = (left - 2 * middle + right).clamp_max(-1e-8)
    shift = (0.5 * (left - right) / curvature).clamp(-0.5, 0.5)
    bins = torch.arange(1, magnitude.shape[1] - 1, device=magnitude.device)[:, None]
    advance = 2 * math.pi * hop_length / n_fft * (bins + shift)  # radians a hop
    advance = torch.nn.functional.pad(advance, (0, 0, 1, 1))
    is_peak = torch.nn.functional.pad(is_peak, (0, 0, 1, 1))

    owner = _nearest_peak(is_peak)
    advance = advance.gather(1, owner)
    # Bins beside a peak turn with it, in alternating sign: the window is centred in its frame.
    distance = torch.arange(magnitude.shape[1], device=magnitude.device)[:, None] - owner
    phase = torch.zeros_like(magnitude)
    current = torch.zeros_like(magnitude[:, :, 0])
    for t in range(magnitude.shape[2]):
        # A frame inherits the phase its peak's bin had reached, wherever that bin belonged then.
        current = current.gather(1, owner[:, :, t]) + advance[:, :, t]
        current = current.remainder(2 * math.pi)  # float32 would lose the phase of long clips
        phase[:, :, t] = current + math.pi * (distance[:, :, t] % 2)
    return phase


def _nearest_peak(is_peak: Tensor) -> Tensor:
    """[B, bins, T] index of the peak nearest to each bin; a frame without peaks owns itself."""
    num_bins = is_peak.shape[1]
    bins = torch.arange(num_bins, device=is_peak.device)[:, None].expand_as(is_peak)
    below = torch.where(is_peak, bins, -num_bins).cummax(1).values
    above = torch.where(is_peak, bins, 3 * num_bins).flip(1).cummin(1).values.flip(1)
    owner = torch.where(bins - below <= above - bins, below, above)
    return torch.where((owner >= 0) & (owner < num_bins), owner, bins)
