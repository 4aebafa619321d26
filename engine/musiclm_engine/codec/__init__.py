"""Audio codecs: SoundStream on the waveform, and its spectral variant."""

from musiclm_engine.codec.codec import Codec
from musiclm_engine.codec.soundstream import SoundStream
from musiclm_engine.codec.spectral import SpectralSoundStream

__all__ = ["Codec", "SoundStream", "SpectralSoundStream"]
