"""Text to music: MuLaN, AudioLM's three stages and SoundStream.

from musiclm_engine import MusicLM

model = MusicLM.from_pretrained()
out = model.generate("a slow hymn on a church organ in G minor", seconds=10)
out.audio  # [prompts, samples, time], best candidate first
"""

from musiclm_engine.audiolm import (
    CoarseTransformer,
    FineTransformer,
    SemanticTokenizer,
    SemanticTransformer,
)
from musiclm_engine.codec import SoundStream, SpectralSoundStream
from musiclm_engine.generation import AudioLM
from musiclm_engine.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    TextTransformer,
)
from musiclm_engine.musiclm import MusicLM, MusicLMOutput

__all__ = [
    "AudioLM",
    "AudioSpectrogramTransformer",
    "CoarseTransformer",
    "FineTransformer",
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "MusicLM",
    "MusicLMOutput",
    "SemanticTokenizer",
    "SemanticTransformer",
    "SoundStream",
    "SpectralSoundStream",
    "TextTransformer",
]
