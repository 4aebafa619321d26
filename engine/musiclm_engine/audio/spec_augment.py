"""SpecAugment: a random tempo and random masks for each row of a batch of log-mel spectrograms."""

import torch
from torch import Tensor, nn


class SpecAugment(nn.Module):
    """In training, stretches each row in time and masks spans of its frames and of its mel bins.

    After Park et al. (arXiv 1904.08779, section 2). There, time is warped between two points of
    the clip; here a whole row plays at one rate, as musiclm-pytorch's audio tower means to do.
    Each row draws its own rate and masks. The default masks are those of AST's recipe for AudioSet
    (YuanGongND/ast, egs/audioset/run.sh: 128 bins, 1024 frames), the range of rates is ours.

    A stretch changes the tempo: turn it off where captions tell it in beats per minute. Nothing
    here waits for the device. In `eval()` the input comes back as it is.

    torchaudio's masks know neither rows of unequal length nor a mean for each row, and its
    `TimeStretch` wants the complex spectrogram and takes one rate for the batch.

    Args:
        stretch_factor: in (0, 1]; rates are uniform in [stretch_factor, 1 / stretch_factor]. 1
            turns the stretch off.
        freq_mask, time_mask: the widest span of mel bins, and of frames; 0 turns a mask off.
            Widths are uniform over the integers from 0 to the widest, places over all that fit.
            However wide they may be, the masks of an axis together never take more than half of
            it: of the bins, or of the row's own frames.
        num_freq_masks, num_time_masks: spans in each row; they may overlap.
        floor: the mel power of silence, as `LogMel`'s.

    Raises:
        ValueError: an argument outside the limits above.
    """

    def __init__(
        self,
        *,
        stretch_factor: float = 0.8,
        freq_mask: int = 48,
        time_mask: int = 192,
        num_freq_masks: int = 1,
        num_time_masks: int = 1,
        floor: float = 1e-5,
    ):
        super().__init__()
        if not 0 < stretch_factor <= 1:
            raise ValueError(f"stretch_factor={stretch_factor}; want 0 < stretch_factor <= 1")
        if freq_mask < 0 or time_mask < 0:
            raise ValueError(f"freq_mask={freq_mask} and time_mask={time_mask} must be >= 0")
        if num_freq_masks < 1 or num_time_masks < 1:
            raise ValueError(
                f"num_freq_masks={num_freq_masks} and num_time_masks={num_time_masks} must be "
                ">= 1; a mask is turned off by its width"
            )
        if floor <= 0:
            raise ValueError(f"floor={floor}; want floor > 0")
        self.stretch_factor = stretch_factor
        self.freq_mask = freq_mask
        self.time_mask = time_mask
        self.num_freq_masks = num_freq_masks
        self.num_time_masks = num_time_masks
        self.floor = floor

    def forward(
        self, spectrogram: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draws from the generator of the spectrogram's device, and augments.

        Args:
            spectrogram: (B, T, F), float32 or float64: natural logarithms of mel power.
            lengths: (B,) integers on the same device, frames of each row that are its own; None is
                all of them. They must lie in [1, T], which is not checked: reading them would wait
                for the device.

        Returns:
            The spectrogram (B, T, F) and its rows' lengths. With a stretch they are always (B,)
            int64: a faster row is shorter and then silent, a slower one is cut at T. Without,
            they are `lengths`. Masked values are the row's mean over its own frames.

        Raises:
            ValueError: a spectrogram or lengths of another shape or dtype.
        """
        if spectrogram.ndim != 3 or spectrogram.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"spectrogram is {spectrogram.dtype} of shape {tuple(spectrogram.shape)}; "
                "want float32 or float64 (B, T, F)"
            )
        B = len(spectrogram)
        if lengths is not None and (lengths.shape != (B,) or lengths.is_floating_point()):
            raise ValueError(
                f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}; "
                f"want integers of shape ({B},)"
            )
        if not self.training:
            return spectrogram, lengths
        if self.stretch_factor < 1:
            slowest, fastest = self.stretch_factor, 1 / self.stretch_factor
            draws = torch.rand(B, dtype=spectrogram.dtype, device=spectrogram.device)
            rates = slowest + (fastest - slowest) * draws
            spectrogram, lengths = time_stretch(spectrogram, rates, lengths, floor=self.floor)
        if self.freq_mask or self.time_mask:
            spectrogram = self._mask(spectrogram, lengths)
        return spectrogram, lengths

    def _mask(self, spectrogram: Tensor, lengths: Tensor | None) -> Tensor:
        lengths = _sizes(spectrogram, 1) if lengths is None else lengths
        times, bins = _positions(spectrogram, 1), _positions(spectrogram, 2)
        own = (times < lengths[:, None])[:, :, None]  # [B, T, 1]
        mean = spectrogram.where(own, 0).sum(dim=(1, 2)) / (lengths * len(bins))
        masked_times = _spans(times, lengths, self.time_mask, self.num_time_masks)
        masked_bins = _spans(bins, _sizes(spectrogram, 2), self.freq_mask, self.num_freq_masks)
        masked = masked_times[:, :, None] | (masked_bins[:, None, :] & own)
        return torch.where(masked, mean[:, None, None], spectrogram)


def time_stretch(
    spectrogram: Tensor, rates: Tensor, lengths: Tensor | None = None, *, floor: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Plays each row at its own rate, at the same pitch: frame t becomes the old frame t * rate.

    Between two frames, magnitudes (square roots of mel power) are interpolated linearly, as a
    phase vocoder does; it then only adds the phases, which a spectrogram has not.

    Args:
        spectrogram: (B, T, F), float32 or float64: natural logarithms of mel power.
        rates: (B,), positive, of the same dtype; 2 is twice as fast.
        lengths: (B,) integers in [1, T], frames of each row that are its own; None is all of them.
            What lies beyond is taken to be silent.
        floor: the mel power of silence.

    Returns:
        The spectrogram (B, T, F), and its rows' lengths (B,) int64: ceil(length / rate), at most T.
    """
    T, F = spectrogram.shape[1:]
    lengths = _sizes(spectrogram, 1) if lengths is None else lengths
    places = _positions(spectrogram, 1) * rates[:, None]  # [B, T], in old frames
    first = places.long()
    magnitudes = (spectrogram / 2).exp()

    def frames(indices: Tensor) -> Tensor:
        rows = indices.clamp(max=T - 1)[:, :, None].expand(-1, -1, F)
        own = (indices < lengths[:, None])[:, :, None]
        return magnitudes.gather(1, rows).where(own, floor**0.5)

    stretched = torch.lerp(frames(first), frames(first + 1), (places - first)[:, :, None])
    # Counted, not divided: so the frames beyond are exactly those that hold nothing of the row.
    return 2 * stretched.log(), (places < lengths[:, None]).sum(dim=1)


def _spans(positions: Tensor, extents: Tensor, max_width: int, num_spans: int) -> Tensor:
    """bool [B, len(positions)]: random spans within the first `extents` (B,) positions."""
    widest = (extents // (2 * num_spans)).clamp(max=max_width)
    draws = torch.rand(2, len(extents), num_spans, device=extents.device)
    widths = (draws[0] * (widest + 1)[:, None]).long()
    starts = (draws[1] * (extents[:, None] - widths + 1)).long()
    after_start = positions[:, None] >= starts[:, None]  # [B, positions, spans]
    before_end = positions[:, None] < (starts + widths)[:, None]
    return (after_start & before_end).any(dim=2)


def _positions(spectrogram: Tensor, dim: int) -> Tensor:
    return torch.arange(spectrogram.shape[dim], device=spectrogram.device)


def _sizes(spectrogram: Tensor, dim: int) -> Tensor:
    """For each row, the whole of the dimension."""
    size = spectrogram.shape[dim]
    return torch.full((len(spectrogram),), size, device=spectrogram.device)
