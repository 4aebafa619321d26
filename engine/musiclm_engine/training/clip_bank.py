"""All clips of a split as one row of 16-bit samples: what training reads at random."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.audio import load_audio
from musiclm_engine.checkpoint import CheckpointError, read_json, write_json
from musiclm_engine.data.manifest import Clip
from musiclm_engine.whole_file import whole_file

FULL_SCALE = 32768
CLIPS_AT_A_TIME = 64  # decoded and not yet written, which bounds the memory


@dataclass(frozen=True)
class ClipBank:
    """N clips, one after another.

    Attributes:
        audio: [samples of all clips] int16, in a mapped file or on a device.
        first: [N + 1] int64: clip n is audio[first[n] : first[n + 1]].
        lengths: of each clip in samples, the same numbers where the host can read them.
        sample_rate_hz: of audio.
    """

    audio: Tensor
    first: Tensor
    lengths: list[int]
    sample_rate_hz: int

    def __len__(self) -> int:
        return len(self.lengths)

    def crops(self, rows: Tensor, starts: Tensor, samples: int) -> Tensor:
        """Stretches of clips, [B, samples] float32 in [-1, 1]; silence where a clip has ended.

        Args:
            rows: [B] int64 clips.
            starts: [B] int64, where in its clip a stretch begins.
            samples: of a stretch.
        """
        moment = starts[:, None] + torch.arange(samples, device=rows.device)
        begin, end = self.first[rows][:, None], self.first[rows + 1][:, None]
        index = begin + moment
        stretch = self.audio[index.clamp_max(len(self.audio) - 1)]
        return torch.where(index < end, stretch, 0).float() / FULL_SCALE

    def to(self, device: torch.device) -> "ClipBank":
        return ClipBank(
            self.audio.to(device), self.first.to(device), self.lengths, self.sample_rate_hz
        )


def open_bank(
    clips: list[Clip],
    path: Path,
    sample_rate_hz: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> ClipBank:
    """The bank of clips at `path`, made now if it is not there or their files have changed since.

    Audio is mixed to one channel, resampled where it must be, and rounded to 16 bits, which changes
    nothing of 16-bit files at this rate; louder than full scale is clipped.

    Args:
        clips: of any lengths, rates and formats.
        path: of the samples; beside it PATH.json says what they are.
        on_progress: called with how many clips are decoded, of how many.

    Raises:
        AudioFileError: a clip cannot be read.
        OSError: the folder cannot be written to.
    """
    note = path.with_name(path.name + ".json")
    fingerprint = _fingerprint(clips, sample_rate_hz)
    lengths = _lengths(note, fingerprint) if path.exists() else None
    if lengths is None:
        lengths = []
        with whole_file(path) as unfinished, unfinished.open("wb") as file:
            for samples in _decoded(clips, sample_rate_hz):
                samples.tofile(file)
                lengths.append(len(samples))
                if on_progress is not None:
                    on_progress(len(lengths), len(clips))
            note.unlink(missing_ok=True)  # it speaks of the file that now goes
        write_json(note, {"fingerprint": fingerprint, "lengths": lengths})
    # Mode "c": PyTorch takes no memory that it might not write to. Nothing is written.
    audio = torch.from_numpy(np.memmap(path, np.int16, mode="c"))
    return ClipBank(audio, torch.tensor([0, *accumulate(lengths)]), lengths, sample_rate_hz)


def _fingerprint(clips: list[Clip], sample_rate_hz: int) -> str:
    digest = hashlib.sha256(str(sample_rate_hz).encode())
    for clip in clips:
        found = clip.audio.stat()
        digest.update(f"{clip.audio}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _lengths(note: Path, fingerprint: str) -> list[int] | None:
    try:
        found = read_json(note)
    except CheckpointError:
        return None
    is_of_these = isinstance(found, dict) and found.get("fingerprint") == fingerprint
    return found["lengths"] if is_of_these else None


def _decoded(clips: list[Clip], sample_rate_hz: int) -> Iterator[np.ndarray]:
    def decode(clip: Clip) -> np.ndarray:
        # By NumPy: from each of these threads PyTorch would start a team of its own.
        audio = load_audio(clip.audio, sample_rate_hz).numpy() * FULL_SCALE
        return audio.round().clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)

    with ThreadPoolExecutor() as pool:  # libsndfile works outside Python's lock
        for start in range(0, len(clips), CLIPS_AT_A_TIME):
            yield from pool.map(decode, clips[start : start + CLIPS_AT_A_TIME])
