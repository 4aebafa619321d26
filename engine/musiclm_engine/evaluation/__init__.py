"""Judges that took no part in training, and the evaluation that they give."""

from musiclm_engine.evaluation.evaluate import (
    JudgedClip,
    Judgement,
    Judges,
    compare_judgements,
    evaluate_clips,
    is_audibly_notes,
)
from musiclm_engine.evaluation.report import markdown_table

__all__ = [
    "JudgedClip",
    "Judgement",
    "Judges",
    "compare_judgements",
    "evaluate_clips",
    "is_audibly_notes",
    "markdown_table",
]
