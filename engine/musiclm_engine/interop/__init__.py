"""Other projects' models, run by this engine."""

from musiclm_engine.interop.audiolm_pytorch import AudioLMStage, stage_from_audiolm_pytorch

__all__ = ["AudioLMStage", "stage_from_audiolm_pytorch"]
