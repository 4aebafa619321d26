"""The parts a MusicLM is made of, as they lie on disk."""

from pathlib import Path
from typing import Any

from musiclm_engine.audiolm import (
    CoarseTransformer,
    FineTransformer,
    SemanticTokenizer,
    SemanticTransformer,
)
from musiclm_engine.audiolm.best_rq import BestRQTokenizer
from musiclm_engine.audiolm.note_tokenizer import NoteTokenizer
from musiclm_engine.checkpoint import load_model
from musiclm_engine.codec import SoundStream, SpectralSoundStream
from musiclm_engine.mulan import MuLaN, MuLaNEmbedQuantizer
from musiclm_engine.tempo_reader import TempoReader

CLASSES: dict[str, tuple[type, ...]] = {
    "codec": (SpectralSoundStream, SoundStream),
    "tokenizer": (SemanticTokenizer, NoteTokenizer, BestRQTokenizer),
    "mulan": (MuLaN,),
    "quantizer": (MuLaNEmbedQuantizer,),
    "tempo_reader": (TempoReader,),
    "semantic": (SemanticTransformer,),
    "coarse": (CoarseTransformer,),
    "fine": (FineTransformer,),
}


def load_component(name: str, stem: Path) -> Any:
    """Load a part by the name it has in `CLASSES`; see `checkpoint.load_model`."""
    return load_model(stem, {cls.__name__: cls for cls in CLASSES[name]})
