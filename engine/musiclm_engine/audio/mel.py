"""The log-mel front end of the audio towers."""

import warnings

import torch
from torch import Tensor, nn

from musiclm_engine.audio import _torchaudio


class LogMel(nn.Module):
    """Log-mel power spectrogram: log(max(mel(|STFT(audio)|^2), floor)), natural logarithm.

    Frame t is centred on sample `t * hop + hop / 2`; the clip is taken to be silent outside its
    ends (zero padding), so there are exactly `time // hop` frames, and silence appended to a clip
    changes none of the frames it had. Always computed in float32, also under autocast.

    Defaults are those of MuLan's transformer tower (arXiv 2208.12415, section 4: 10 ms hop, 128
    bins; 64 for its convolutional tower) with the 16 kHz, 25 ms Hann window of AST (arXiv
    2104.01778, section 2.1); bins lie on the HTK mel scale.

    Args:
        sample_rate_hz: rate of the audio that will come.
        n_fft: FFT length in samples; None takes the smallest power of two that holds the window
            and leaves no mel bin without an FFT bin.
        window_ms: length of the Hann window.
        hop_ms: distance between frames; must be a whole number of samples.
        num_mels: F, the number of mel bins.
        f_min_hz: lower edge of the lowest bin.
        f_max_hz: upper edge of the highest bin; None is half the sample rate.
        floor: smallest mel power that the logarithm sees.

    Raises:
        ValueError: a hop that is not a whole number of samples, a window longer than `n_fft`,
            band edges out of order or above half the sample rate, or mel bins that hold no FFT
            bin at the given `n_fft`.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        sample_rate_hz: int = 16000,
        *,
        n_fft: int | None = None,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        num_mels: int = 128,
        f_min_hz: float = 20.0,
        f_max_hz: float | None = None,
        floor: float = 1e-5,
    ):
        super().__init__()
        f_max_hz = sample_rate_hz / 2 if f_max_hz is None else f_max_hz
        if not 0 <= f_min_hz < f_max_hz <= sample_rate_hz / 2:
            raise ValueError(
                f"f_min_hz={f_min_hz} and f_max_hz={f_max_hz} must satisfy "
                f"0 <= f_min_hz < f_max_hz <= {sample_rate_hz / 2} (half of sample_rate_hz)"
            )
        if num_mels < 1 or floor <= 0:
            raise ValueError(f"num_mels={num_mels} must be >= 1 and floor={floor} must be > 0")
        self.sample_rate_hz = sample_rate_hz
        self.num_mels = num_mels
        self.floor = floor
        self.hop_samples = whole_samples("hop_ms", hop_ms, sample_rate_hz)
        window_samples = max(1, round(window_ms * sample_rate_hz / 1000))

        sizes = [n_fft] if n_fft is not None else _fft_sizes(max(window_samples, self.hop_samples))
        if n_fft is not None and n_fft < max(window_samples, self.hop_samples):
            raise ValueError(
                f"n_fft={n_fft} is shorter than the window of {window_samples} samples "
                f"({window_ms} ms at {sample_rate_hz} Hz) or the hop of {self.hop_samples}"
            )
        for size in sizes:
            filters = _mel_filters(size, f_min_hz, f_max_hz, num_mels, sample_rate_hz)
            if bool((filters.amax(0) > 0).all()):
                break
        else:
            raise ValueError(
                f"num_mels={num_mels} between {f_min_hz} and {f_max_hz} Hz leaves mel bins without "
                f"any FFT bin at n_fft={sizes[-1]}; take fewer bins or a longer n_fft"
            )
        self.n_fft = size
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def num_frames(self, length_samples: int) -> int:
        """Frames of a clip of `length_samples` samples: `length_samples // hop`."""
        return length_samples // self.hop_samples

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (B, time), floating point -> float32 log-mel (B, time // hop, F).

        Raises:
            ValueError: audio that is not (B, time), or shorter than one hop.
        """
        if audio.ndim != 2:
            raise ValueError(f"audio has shape {tuple(audio.shape)}; want (B, time)")
        if audio.shape[-1] < self.hop_samples:
            raise ValueError(
                f"audio has {audio.shape[-1]} samples; want at least one hop of {self.hop_samples}"
            )
        with torch.autocast(audio.device.type, enabled=False):
            left = (self.n_fft - self.hop_samples) // 2
            right = self.n_fft - self.hop_samples - left
            spectrum = torch.stft(
                nn.functional.pad(audio.float(), (left, right)),
                self.n_fft,
                hop_length=self.hop_samples,
                win_length=len(self.window),
                window=self.window.float(),
                center=False,
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()  # [B, bins, frames]
            mel = power.transpose(1, 2) @ self.filters.float()
            return mel.clamp(min=self.floor).log()


def whole_samples(name: str, value_ms: float, sample_rate_hz: int) -> int:
    """Milliseconds to samples; refuses what is not a whole, positive number of them."""
    samples = value_ms * sample_rate_hz / 1000
    if samples < 1 or abs(samples - round(samples)) > 1e-6:
        raise ValueError(
            f"{name}={value_ms} is {samples:g} samples at {sample_rate_hz} Hz; "
            "want a whole number, at least 1"
        )
    return round(samples)


def _fft_sizes(window_samples: int) -> list[int]:
    """Candidate FFT lengths: powers of two from the window's length to 16 times that."""
    smallest = 1 << (window_samples - 1).bit_length()
    return [smallest << shift for shift in range(5)]


def _mel_filters(
    n_fft: int, f_min_hz: float, f_max_hz: float, num_mels: int, sample_rate_hz: int
) -> Tensor:
    """Triangular HTK filters, [n_fft // 2 + 1, F]."""
    with warnings.catch_warnings():  # it warns of empty filters; the caller looks for itself
        warnings.simplefilter("ignore")
        return _torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, f_min_hz, f_max_hz, num_mels, sample_rate_hz
        )
