"""Log-mel front end and its augmentation; loading and saving audio."""

from musiclm_engine.audio.files import AudioFileError, load_audio, save_audio
from musiclm_engine.audio.mel import LogMel
from musiclm_engine.audio.spec_augment import SpecAugment

__all__ = ["AudioFileError", "LogMel", "SpecAugment", "load_audio", "save_audio"]
