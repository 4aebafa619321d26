"""Text to music: MuLaN, AudioLM's three stages and SoundStream.

from musiclm_engine import MusicLM

model = MusicLM.from_pretrained()
out = model.generate("a slow hymn on a church organ in G minor", seconds=10)
out.audio  # [prompts, samples, time], best candidate first
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musiclm_engine.audiolm import (
        BestRQTokenizer,
        CoarseTransformer,
        FineTransformer,
        NoteTokenizer,
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
    from musiclm_engine.tempo_reader import TempoReader

__all__ = [
    "AudioLM",
    "AudioSpectrogramTransformer",
    "BestRQTokenizer",
    "CoarseTransformer",
    "FineTransformer",
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "MusicLM",
    "MusicLMOutput",
    "NoteTokenizer",
    "SemanticTokenizer",
    "SemanticTransformer",
    "SoundStream",
    "SpectralSoundStream",
    "TempoReader",
    "TextTransformer",
]

_HOMES = {
    "audiolm": (
        "BestRQTokenizer",
        "CoarseTransformer",
        "FineTransformer",
        "NoteTokenizer",
        "SemanticTokenizer",
        "SemanticTransformer",
    ),
    "codec": ("SoundStream", "SpectralSoundStream"),
    "generation": ("AudioLM",),
    "mulan": ("AudioSpectrogramTransformer", "MuLaN", "MuLaNEmbedQuantizer", "TextTransformer"),
    "musiclm": ("MusicLM", "MusicLMOutput"),
    "tempo_reader": ("TempoReader",),
}


def __getattr__(name: str) -> Any:
    # PyTorch takes a second to import: `musiclm --help` must not wait for it.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"musiclm_engine.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
