"""A model on the bench: with its judges, and the folder where what took time is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_engine.audio import load_audio
from musiclm_engine.data.manifest import Clip
from musiclm_engine.evaluation.codec_judgement import rebuild
from musiclm_engine.evaluation.judges import JUDGES_VERSION, Judgement, Judges
from musiclm_engine.evaluation.work_folder import WorkFolder, file_sha256
from musiclm_engine.musiclm import MusicLM

Progress = Callable[[str, int, int], None]  # of what, how many are done, of how many


@dataclass(frozen=True)
class Bench:
    """What every part of an evaluation needs.

    Attributes:
        model: in evaluation mode.
        model_sha256: `musiclm.fingerprint` of it.
        judges: loaded.
        work: where results are kept.
        progress: told how far it is.
    """

    model: MusicLM
    model_sha256: str
    judges: Judges
    work: WorkFolder
    progress: Progress

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def codec_levels(self) -> int:
        """That generation uses; the codec may have more."""
        audiolm = self.model.audiolm
        return audiolm.coarse.target_levels + audiolm.fine.target_levels

    def judge(self, what: str, files: Sequence[Path]) -> list[Judgement]:
        """What the judges hear in each file; a sound that was judged before is not judged again."""
        judgements = []
        for done, path in enumerate(files, start=1):
            content = self.work.kept(
                "judgements", JUDGES_VERSION, file_sha256(path), compute=partial(self._judge, path)
            )
            judgements.append(Judgement.from_json(content))
            self.progress(what, done, len(files))
        return judgements

    def embed(self, what: str, clips: Sequence[Clip], *, levels: int = 0) -> np.ndarray:
        """The tagger's embeddings [patches, 200] of clips, rebuilt from `levels` of the codec if
        that is not 0."""
        coded = (self.model_sha256, levels) if levels else ()
        rows: list[list[float]] = []
        for done, clip in enumerate(clips, start=1):
            rows += self.work.kept(
                "embeddings",
                JUDGES_VERSION,
                *coded,
                file_sha256(clip.audio),
                compute=partial(self._embed, clip.audio, levels),
            )
            self.progress(what, done, len(clips))
        return np.array(rows)

    def audio(self, clips: Iterable[Clip], seconds: float) -> Tensor:
        """The beginnings [clips, samples] of clips, on the model's device; silence where a file is
        a little shorter than its manifest says."""
        rate_hz = self.model.sample_rate
        rows = [load_audio(clip.audio, rate_hz, seconds=seconds) for clip in clips]
        samples = round(seconds * rate_hz)
        return torch.stack([F.pad(row, (0, samples - len(row))) for row in rows]).to(self.device)

    def _judge(self, path: Path) -> dict[str, Any]:
        rate_hz = self.model.sample_rate
        return self.judges(load_audio(path, rate_hz).numpy(), rate_hz).to_json()

    def _embed(self, path: Path, levels: int) -> list[list[float]]:
        codec, rate_hz = self.model.audiolm.codec, self.model.sample_rate
        audio = load_audio(path, rate_hz)
        if levels:
            codes = codec.encode(audio[None].to(self.device))
            audio = rebuild(codec, codes[:, :, :levels], len(audio))
        return self.judges.tag(audio.numpy(), rate_hz).embedding.tolist()
