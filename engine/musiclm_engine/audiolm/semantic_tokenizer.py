"""Semantic tokens without training: what note sounds on what, clustered from the audio's spectrum.

AudioLM clusters the activations of a large pretrained model (section III-A). This one needs no
model at all: its features are the energies of semitone bands, which say pitch, and of
mel bands, which say timbre, decorrelated by principal components and clustered by k-means.
"""

import torch
from torch import Tensor

from musiclm_engine.audio import LogMel
from musiclm_engine.audiolm.bands import PitchBands, shape_of
from musiclm_engine.audiolm.clustered import ClusteredTokens


class SemanticTokenizer(ClusteredTokens):
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
        super().__init__(
            width=num_pitches + num_mels,
            num_components=num_components,
            num_tokens=num_tokens,
            sample_rate_hz=sample_rate_hz,
            hop_length=hop_length,
        )
        self.config = {
            "num_tokens": num_tokens,
            "num_components": num_components,
            "sample_rate_hz": sample_rate_hz,
            "hop_length": hop_length,
            "num_pitches": num_pitches,
            "num_mels": num_mels,
            "timbre_weight": timbre_weight,
        }
        self.timbre_weight = timbre_weight
        self.pitch_bands = PitchBands(
            sample_rate_hz=sample_rate_hz, hop_length=hop_length, n_fft=2048, num_bands=num_pitches
        )
        self.log_mel = LogMel(
            sample_rate_hz=sample_rate_hz,
            n_fft=1024,
            window_ms=64,
            hop_ms=1000 * hop_length / sample_rate_hz,
            num_mels=num_mels,
        )

    @torch.no_grad()
    def features(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> band energies [B, T, num_pitches + num_mels], T rounded up."""
        audio = self.whole_hops(audio)
        # Loudness is left to the acoustic tokens.
        pitch, timbre = shape_of(self.pitch_bands(audio)), shape_of(self.log_mel(audio))
        return torch.cat([pitch, self.timbre_weight * timbre], dim=-1)
