"""What the tokenizers hear with: energies of bands at equal distances of pitch, and of mel bands."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.audio import LogMel

LOWEST_MIDI_PITCH = 33  # A1, 55 Hz: below it no window here can tell semitones apart
FLOOR = 1e-3  # of band energies, as a share of n_fft, before the logarithm
LOUDNESS = 0.8  # share of a frame's mean log energy that is left out, so that gain counts little
SMALLEST_DEVIATION = 1e-3  # a band that never changes counts nothing, whatever it is divided by


class PitchBands(nn.Module):
    """Log energies of triangular bands a fraction of a semitone apart, upwards from A1.

    Args:
        sample_rate_hz: of the audio.
        hop_length: samples between frames.
        n_fft: samples of a frame, a Hann window: longer tells lower pitches apart, and says less
            of when they sound.
        num_bands: bands.
        per_semitone: bands to a semitone.
    """

    window: Tensor
    bands: Tensor

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        hop_length: int,
        n_fft: int,
        num_bands: int,
        per_semitone: int = 1,
    ) -> None:
        super().__init__()
        self.hop_length = hop_length
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        bands = _pitch_bands(sample_rate_hz, n_fft, num_bands, per_semitone)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """audio [B, T * hop_length] -> [B, T, num_bands]."""
        # Frames are centred on their hop: half a hop in, half a window of silence around.
        spectrum = torch.stft(
            F.pad(audio, ((self.n_fft - self.hop_length) // 2,) * 2),
            self.n_fft,
            self.hop_length,
            window=self.window,
            center=False,
            return_complex=True,
        ).abs()
        return (spectrum.transpose(1, 2) @ self.bands + FLOOR * self.n_fft).log()


def shape_of(log_energies: Tensor) -> Tensor:
    """The shape of a spectrum [..., bands], and of its loudness a part that tells attack from decay."""
    return log_energies - LOUDNESS * log_energies.mean(-1, keepdim=True)


class FrontEnd(nn.Module):
    """Semitone bands over 128 ms, thirds of semitones over 256 ms and 40 mel bands over 64 ms.

    The long window tells the notes of a bass apart, the short ones say when a note begins. Each
    band is brought to mean 0 and deviation 1 by what `standardise` has seen.

    Args:
        sample_rate_hz: of the audio.
        hop_length: samples between frames.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, *, sample_rate_hz: int, hop_length: int) -> None:
        super().__init__()
        sizes = {"sample_rate_hz": sample_rate_hz, "hop_length": hop_length}
        window_samples = 2 ** round(math.log2(0.128 * sample_rate_hz))
        self.semitones = PitchBands(n_fft=window_samples, num_bands=78, **sizes)
        self.thirds = PitchBands(n_fft=2 * window_samples, num_bands=216, per_semitone=3, **sizes)
        self.log_mel = LogMel(
            sample_rate_hz=sample_rate_hz,
            n_fft=window_samples // 2,
            window_ms=64,
            hop_ms=1000 * hop_length / sample_rate_hz,
            num_mels=40,
        )
        self.width = 78 + 216 + 40
        self.register_buffer("mean", torch.zeros(self.width))
        self.register_buffer("deviation", torch.ones(self.width))

    @torch.no_grad()
    def standardise(self, audio: Tensor) -> None:
        """Take the means and deviations of the bands of audio [B, T * hop_length]."""
        bands = self.raw(audio).flatten(0, 1)
        self.mean.copy_(bands.mean(0))
        self.deviation.copy_(bands.std(0, correction=0).clamp_min(SMALLEST_DEVIATION))

    @torch.no_grad()
    def raw(self, audio: Tensor) -> Tensor:
        """audio [B, T * hop_length] -> shapes [B, T, width], float32 under autocast too."""
        with torch.autocast(audio.device.type, enabled=False):
            parts = [self.semitones(audio), self.thirds(audio), self.log_mel(audio)]
            return torch.cat([shape_of(part) for part in parts], dim=-1)

    def forward(self, audio: Tensor) -> Tensor:
        """audio [B, T * hop_length] -> [B, T, width]."""
        return (self.raw(audio) - self.mean) / self.deviation


def _pitch_bands(sample_rate_hz: int, n_fft: int, num_bands: int, per_semitone: int) -> Tensor:
    """Triangles over pitch on the STFT's bins: [n_fft / 2 + 1, num_bands]."""
    hz = torch.arange(1, n_fft // 2 + 1) * (sample_rate_hz / n_fft)
    pitch = torch.cat([torch.tensor([-math.inf]), 69 + 12 * (hz / 440).log2()])
    centre = LOWEST_MIDI_PITCH + torch.arange(num_bands) / per_semitone
    # Low down a bin is wider than the distance of bands: a band then reaches to the nearest bins.
    bin_width = 12 * (1 + (sample_rate_hz / n_fft) / (440 * 2 ** ((centre - 69) / 12))).log2()
    half_width = bin_width.clamp_min(1 / per_semitone)
    return (1 - (pitch[:, None] - centre).abs() / half_width).clamp_min(0)
