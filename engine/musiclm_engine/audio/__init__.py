"""Log-mel front end; loading and saving audio."""

from musiclm_engine.audio.files import AudioFileError, load_audio, save_audio
from musiclm_engine.audio.mel import LogMel

__all__ = ["AudioFileError", "LogMel", "load_audio", "save_audio"]
