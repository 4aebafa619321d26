"""Semantic tokens: what note sounds on what, clustered from the audio's own spectrum.

AudioLM clusters the activations of a large pretrained model (section III-A). This one needs no
pretrained model: its features are the energies of semitone bands, which say pitch, and of
mel bands, which say timbre, decorrelated by principal components and clustered by k-means.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.audio import LogMel
from musiclm_engine.kmeans import kmeans
from musiclm_kernels import rvq_encode

LOWEST_MIDI_PITCH = 33  # A1, 55 Hz: below it a 128 ms window cannot tell semitones apart
FLOOR = 1e-3  # of band energies, before the logarithm


class SemanticTokenizer(nn.Module):
    """Audio to one token a frame.

    Args:
        num_tokens: K, clusters.
        num_components: D, principal components that are kept.
        sample_rate_hz: of the audio.
        hop_length: samples a token stands for.
        num_pitches: semitone bands upwards from A1.
        num_mels: mel bands.
        timbre_weight: how much a mel band counts beside a semitone band.
    """

    mean: Tensor
    components: Tensor
    centroids: Tensor
    window: Tensor
    pitch_bands: Tensor

    def __init__(
        self,
        *,
        num_tokens: int = 1024,
        num_components: int = 48,
        sample_rate_hz: int = 16000,
        hop_length: int = 640,
        num_pitches: int = 78,
        num_mels: int = 40,
        timbre_weight: float = 0.7,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "num_tokens": num_tokens,
            "num_components": num_components,
            "sample_rate_hz": sample_rate_hz,
            "hop_length": hop_length,
            "num_pitches": num_pitches,
            "num_mels": num_mels,
            "timbre_weight": timbre_weight,
        }
        self.num_tokens = num_tokens
        self.sample_rate_hz = sample_rate_hz
        self.hop_length = hop_length
        self.timbre_weight = timbre_weight
        self.n_fft = 2048
        self.log_mel = LogMel(
            sample_rate_hz=sample_rate_hz,
            n_fft=1024,
            window_ms=64,
            hop_ms=1000 * hop_length / sample_rate_hz,
            num_mels=num_mels,
        )
        width = num_pitches + num_mels
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.zeros(width, num_components))
        self.register_buffer("centroids", torch.zeros(num_tokens, num_components))
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        bands = _semitone_bands(sample_rate_hz, self.n_fft, num_pitches)
        self.register_buffer("pitch_bands", bands, persistent=False)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    @torch.no_grad()
    def features(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> band energies [B, T, num_pitches + num_mels], T rounded up."""
        if audio.dim() != 2 or audio.shape[1] == 0:
            raise ValueError(f"audio is {tuple(audio.shape)}, wanted [batch, samples >= 1]")
        audio = F.pad(audio, (0, -audio.shape[1] % self.hop_length))
        # Frames are centred on their token: half a hop in, half a window of silence around.
        padded = F.pad(audio, ((self.n_fft - self.hop_length) // 2,) * 2)
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop_length,
            window=self.window,
            center=False,
            return_complex=True,
        ).abs()
        pitch = (spectrum.transpose(1, 2) @ self.pitch_bands + FLOOR * self.n_fft).log()
        timbre = self.log_mel(audio)
        # Loudness is left to the acoustic tokens: only the shape of the spectrum is kept,
        # but for a part that tells attack from decay.
        pitch = pitch - 0.8 * pitch.mean(-1, keepdim=True)
        timbre = timbre - 0.8 * timbre.mean(-1, keepdim=True)
        return torch.cat([pitch, self.timbre_weight * timbre[:, : pitch.shape[1]]], dim=-1)

    @torch.no_grad()
    def fit(self, features: Tensor, *, seed: int) -> None:
        """Find components and clusters.

        Args:
            features: [N, num_pitches + num_mels], of many clips.
            seed: of k-means.

        Raises:
            ValueError: fewer features than tokens or components.
        """
        num_components = self.components.shape[1]
        if len(features) < num_components:
            raise ValueError(f"features are {len(features)}, {num_components} components want more")
        mean = features.mean(0)
        _, _, directions = torch.linalg.svd((features - mean)[: 1 << 16], full_matrices=False)
        # A copy in the buffer's layout: the product below rounds as encode's does.
        components = directions[:num_components].T.clone(memory_format=torch.contiguous_format)
        centroids = kmeans((features - mean) @ components, self.num_tokens, seed=seed)
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.centroids.copy_(centroids)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> tokens [B, T] int64."""
        if not self.components.any():
            raise RuntimeError("the semantic tokenizer is not fitted: call fit() or load one")
        features = (self.features(audio) - self.mean) @ self.components
        tokens, _ = rvq_encode(features.flatten(0, 1), self.centroids[None])
        return tokens.view(features.shape[:2])


def _semitone_bands(sample_rate_hz: int, n_fft: int, num_pitches: int) -> Tensor:
    """Triangular bands a semitone apart on the STFT's bins: [n_fft / 2 + 1, num_pitches]."""
    hz = torch.arange(1, n_fft // 2 + 1) * (sample_rate_hz / n_fft)
    pitch = torch.cat([torch.tensor([-math.inf]), 69 + 12 * (hz / 440).log2()])
    centre = LOWEST_MIDI_PITCH + torch.arange(num_pitches)
    # Low down a bin is wider than a semitone: a band then reaches to the nearest bins.
    bin_width = 12 * (1 + (sample_rate_hz / n_fft) / (440 * 2 ** ((centre - 69) / 12))).log2()
    half_width = torch.maximum(torch.ones(num_pitches), bin_width)
    return (1 - (pitch[:, None] - centre).abs() / half_width).clamp_min(0)
