"""Generation: sampling, the decode loop, windows, and the stages in their order."""

from musiclm_engine.generation.audiolm import AudioLM, Generated, StageSampling, Windows
from musiclm_engine.generation.sampling import Sampling, derive_seeds

__all__ = ["AudioLM", "Generated", "Sampling", "StageSampling", "Windows", "derive_seeds"]
