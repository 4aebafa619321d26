"""Generation: sampling, the decode step, windows, and the stages in their order."""

from musiclm_engine.generation.audiolm import AudioLM, Generated, StageSampling, Windows
from musiclm_engine.generation.from_stage import decoder_from_stage
from musiclm_engine.generation.sampling import Sampling, derive_seeds
from musiclm_engine.generation.stage_steps import Decoding
from musiclm_engine.generation.step import DecodeStep

__all__ = [
    "AudioLM",
    "DecodeStep",
    "Decoding",
    "Generated",
    "Sampling",
    "StageSampling",
    "Windows",
    "decoder_from_stage",
    "derive_seeds",
]
