"""AudioLM: semantic, coarse and fine stages over discrete tokens (arXiv 2209.03143)."""

from musiclm_engine.audiolm.best_rq import BestRQTokenizer
from musiclm_engine.audiolm.note_tokenizer import NoteTokenizer
from musiclm_engine.audiolm.semantic_tokenizer import SemanticTokenizer
from musiclm_engine.audiolm.stages import CoarseTransformer, FineTransformer, SemanticTransformer

__all__ = [
    "BestRQTokenizer",
    "CoarseTransformer",
    "FineTransformer",
    "NoteTokenizer",
    "SemanticTokenizer",
    "SemanticTransformer",
]
