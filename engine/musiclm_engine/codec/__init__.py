"""Audio codecs: SoundStream on the waveform, and its spectral variant."""

from musiclm_engine.codec.codec import Codec
from musiclm_engine.codec.residual_vq import ResidualVQ
from musiclm_engine.codec.soundstream import SoundStream
from musiclm_engine.codec.spectral import SpectralSoundStream

__all__ = ["Codec", "ResidualVQ", "SoundStream", "SpectralSoundStream"]
