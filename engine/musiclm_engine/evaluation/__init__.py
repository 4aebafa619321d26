"""Judges that took no part in training, and the evaluation that they give."""

from musiclm_engine.evaluation.codec_judgement import judge_codec
from musiclm_engine.evaluation.evaluate import compare_judgements
from musiclm_engine.evaluation.frechet import frechet_distance
from musiclm_engine.evaluation.judges import Judgement, Judges
from musiclm_engine.evaluation.report import markdown_table

__all__ = [
    "Judgement",
    "Judges",
    "compare_judgements",
    "frechet_distance",
    "judge_codec",
    "markdown_table",
]
