"""Reading and writing audio files: libsndfile for the formats, soxr for the sample rate."""

import math
import os
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from musiclm_engine.whole_file import whole_file

FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}
RESAMPLING_MARGIN_SECONDS = 0.05  # read around a crop, so that its edges are the whole file's
WRITE_BLOCK_FRAMES = 65536  # libsndfile's Vorbis encoder overflows its stack on very long writes
UNKNOWN_LENGTH_BYTES = 0x7FFFFF00  # and above: a writer to a pipe, which could not know
UNKNOWN_LENGTH_FRAMES = 1 << 62  # and above: a flac without a length; it cannot be sought in


class AudioFileError(ValueError):
    """An audio file that cannot be read or written; the message names it and says why."""


def load_audio(
    path: str | os.PathLike,
    sample_rate_hz: int,
    *,
    offset_seconds: float = 0.0,
    seconds: float | None = None,
) -> Tensor:
    """Reads a stretch of an audio file as mono float32 (time,) at `sample_rate_hz`.

    Channels are averaged. Only the stretch asked for, and 50 ms around it, is decoded; resampled
    (soxr, HQ) it equals the same stretch of the whole file resampled.

    Args:
        path: a file in any format that libsndfile reads (wav, flac, ogg, mp3, aiff, ...).
        sample_rate_hz: rate of the result.
        offset_seconds: where to start, >= 0.
        seconds: how much to read, > 0; None reads to the end. A file that ends earlier gives less.

    Raises:
        AudioFileError: missing, a folder, not audio, empty, truncated, or `offset_seconds` at or
            past the end.
        ValueError: `sample_rate_hz`, `offset_seconds` or `seconds` out of range.
    """
    if sample_rate_hz < 1:
        raise ValueError(f"sample_rate_hz={sample_rate_hz}; want at least 1")
    if not (math.isfinite(offset_seconds) and offset_seconds >= 0):
        raise ValueError(f"offset_seconds={offset_seconds}; want a number >= 0")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds}; want a number > 0, or None for the rest of the file")

    path = Path(path)
    if not path.exists():
        raise AudioFileError(f"{path}: no such file")
    if path.is_dir():
        raise AudioFileError(f"{path}: is a folder, not an audio file")
    if path.stat().st_size == 0:
        raise AudioFileError(f"{path}: the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(path) as file:
            return _read(path, file, sample_rate_hz, offset_seconds, seconds)
    except soundfile.LibsndfileError as error:
        raise AudioFileError(f"{path}: cannot be read as audio: {error.error_string}") from error
    except TypeError as error:  # soundfile's answer to headerless formats
        raise AudioFileError(f"{path}: cannot be read as audio: {error}") from error
    except OSError as error:
        raise AudioFileError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(
    path: Path,
    file: soundfile.SoundFile,
    sample_rate_hz: int,
    offset_seconds: float,
    seconds: float | None,
) -> Tensor:
    if file.frames >= UNKNOWN_LENGTH_FRAMES:
        raise AudioFileError(
            f"{path}: its header gives no length (it was written to a pipe, or is truncated); "
            "encode it again into a file"
        )
    if file.frames == 0:
        raise AudioFileError(f"{path}: holds no audio (0 samples)")
    _refuse_truncated_wav(path, file)
    rate_hz = file.samplerate
    total = -(-file.frames * sample_rate_hz // rate_hz)  # samples of the whole file, at our rate
    start = round(offset_seconds * sample_rate_hz)
    if start >= total:
        raise AudioFileError(
            f"{path}: offset_seconds={offset_seconds} is past its end "
            f"({file.frames / rate_hz:.3f} s)"
        )
    stop = total if seconds is None else min(total, start + max(1, round(seconds * sample_rate_hz)))

    # Reading starts where both rates have a sample, so that the crop falls on the whole file's.
    step_in = rate_hz // math.gcd(rate_hz, sample_rate_hz)
    step_out = sample_rate_hz // math.gcd(rate_hz, sample_rate_hz)
    margin = 0 if rate_hz == sample_rate_hz else math.ceil(RESAMPLING_MARGIN_SECONDS * rate_hz)
    steps = max(0, (start * step_in // step_out - margin) // step_in)
    read_from = steps * step_in
    read_to = min(file.frames, -(-stop * step_in // step_out) + margin)

    file.seek(read_from)
    samples = file.read(read_to - read_from, dtype="float32", always_2d=True)
    if len(samples) < read_to - read_from:
        raise AudioFileError(
            f"{path}: truncated: its header promises {file.frames} samples a channel, "
            f"{read_from + len(samples)} are there"
        )
    mono = np.ascontiguousarray(samples.mean(axis=1))
    if rate_hz != sample_rate_hz:
        mono = soxr.resample(mono, rate_hz, sample_rate_hz, quality="HQ")
    first = start - steps * step_out
    return torch.from_numpy(np.array(mono[first : first + stop - start], dtype=np.float32))


def _refuse_truncated_wav(path: Path, file: soundfile.SoundFile) -> None:
    """libsndfile shortens a cut-off wav in silence, and only its log says so."""
    found = re.search(r"data : (\d+) \(should be (\d+)\)", file.extra_info)
    if found and int(found[2]) < int(found[1]) < UNKNOWN_LENGTH_BYTES:
        raise AudioFileError(
            f"{path}: truncated: its header promises {found[1]} bytes of audio, "
            f"{found[2]} are there"
        )


def save_audio(path: str | os.PathLike, audio: Tensor, sample_rate_hz: int) -> None:
    """Writes audio (time,) or (channels, time) in [-1, 1]; the suffix chooses the format.

    `.wav` and `.flac` are 16-bit PCM, `.ogg` is Vorbis. Louder samples are clipped. The file
    appears whole or not at all: it is written beside its place and then moved there, so a failure
    leaves an older file of that name as it was.

    Raises:
        AudioFileError: an unknown suffix, a folder that is missing or not writable, a full disk,
            or a format that does not take this sample rate or number of channels.
        ValueError: audio of another shape, without samples, or with values that are not finite.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise AudioFileError(f"{path}: unknown suffix {path.suffix!r}; want {', '.join(FORMATS)}")
    if audio.ndim not in (1, 2) or audio.numel() == 0:
        raise ValueError(
            f"audio has shape {tuple(audio.shape)}; want (time,) or (channels, time), not empty"
        )
    samples = audio.detach().float().cpu().reshape(-1, audio.shape[-1]).T.contiguous().numpy()
    if not np.isfinite(samples).all():
        raise ValueError(f"audio for {path} holds values that are not finite (nan or inf)")
    if not path.parent.is_dir():
        raise AudioFileError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise AudioFileError(f"{path}: is a folder")

    try:
        with whole_file(path) as unfinished:
            _write(unfinished, samples, sample_rate_hz, *FORMATS[path.suffix.lower()])
    except soundfile.LibsndfileError as error:
        raise AudioFileError(f"{path}: cannot be written: {error.error_string}") from error
    except OSError as error:
        raise AudioFileError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write(
    path: Path, samples: np.ndarray, sample_rate_hz: int, container: str, subtype: str
) -> None:
    channels = samples.shape[1]
    with soundfile.SoundFile(path, "w", sample_rate_hz, channels, subtype, None, container) as file:
        for first in range(0, len(samples), WRITE_BLOCK_FRAMES):
            file.write(samples[first : first + WRITE_BLOCK_FRAMES])
    # libsndfile closes a flac that did not fit on the disk without a word.
    if soundfile.info(path).frames != len(samples):
        raise OSError("not all of it was written: is the disk full?")
