"""All clips as tokens, made once: the stages never see audio in training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.audiolm import SemanticTokenizer
from musiclm_engine.checkpoint import read_tensors, write_tensors
from musiclm_engine.codec import Codec
from musiclm_engine.data.manifest import Clip
from musiclm_engine.mulan import MuLaN, MuLaNEmbedQuantizer
from musiclm_engine.training.clips import load_crop

CLIPS_PER_BATCH = 8


@dataclass(frozen=True)
class TokenCache:
    """Tokens of N clips of equal length.

    Attributes:
        semantic: [N, S] int16.
        acoustic: [N, T, Q] int16.
        audio_conditioning: [N, M] int16, MuLan tokens of the clip's audio.
        text_conditioning: [captions, M] int16, of all captions of all clips.
        first_caption: [N + 1] int64: clip n's captions are rows first[n] to first[n + 1].
    """

    semantic: Tensor
    acoustic: Tensor
    audio_conditioning: Tensor
    text_conditioning: Tensor
    first_caption: Tensor

    @classmethod
    def load(cls, path: Path) -> "TokenCache":
        return cls(**read_tensors(path))

    def save(self, path: Path) -> None:
        write_tensors(path, vars(self))

    def batch(
        self, *, size: int, frames: int, stride: int, text_share: float, seed: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A batch that depends on seed and step alone.

        Args:
            size: B.
            frames: T of codec frames to crop, a multiple of stride.
            stride: codec frames a semantic token lasts.
            text_share: of rows conditioned on a caption; the others on their audio.

        Returns:
            conditioning [B, M], semantic [B, T / stride], acoustic [B, T, Q], all int64.

        Raises:
            ValueError: the clips are shorter than the crop, or it holds no semantic token.
        """
        longest = min(self.semantic.shape[1], self.acoustic.shape[1] // stride)
        if not 1 <= frames // stride <= longest:
            raise ValueError(f"a crop is {frames} frames, wanted {stride} to {longest * stride}")
        latest = longest - frames // stride
        random = np.random.default_rng((seed, step))
        conditioning, semantic, acoustic = [], [], []
        for clip in random.integers(len(self.semantic), size=size):
            start = int(random.integers(latest + 1))
            semantic.append(self.semantic[clip, start : start + frames // stride])
            acoustic.append(self.acoustic[clip, start * stride : start * stride + frames])
            first, last = self.first_caption[clip : clip + 2].tolist()
            caption = int(random.integers(first, last))
            from_text = random.random() < text_share
            conditioning.append(
                self.text_conditioning[caption] if from_text else self.audio_conditioning[clip]
            )
        return (
            torch.stack(conditioning).long(),
            torch.stack(semantic).long(),
            torch.stack(acoustic).long(),
        )


@torch.inference_mode()
def tokenize_clips(
    clips: list[Clip],
    *,
    codec: Codec,
    tokenizer: SemanticTokenizer,
    mulan: MuLaN,
    quantizer: MuLaNEmbedQuantizer,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenCache:
    """Run everything that makes tokens over clips; the shortest clip sets the length of all."""
    seconds = min(clip.seconds for clip in clips)
    device = quantizer.codebooks.device
    semantic, acoustic, conditioning = [], [], []
    for start in range(0, len(clips), CLIPS_PER_BATCH):
        some = clips[start : start + CLIPS_PER_BATCH]
        audio = torch.stack(
            [load_crop(clip, 0.0, seconds, codec.sample_rate_hz) for clip in some]
        ).to(device)
        acoustic.append(codec.encode(audio).to("cpu", torch.int16))
        semantic.append(tokenizer.encode(audio).to("cpu", torch.int16))
        conditioning.append(quantizer.encode(mulan.embed_audio(audio)).to("cpu", torch.int16))
        if on_progress is not None:
            on_progress(min(start + CLIPS_PER_BATCH, len(clips)), len(clips))
    captions = [caption for clip in clips for caption in clip.captions]
    text = [
        quantizer.encode(mulan.embed_text(captions[i : i + 256])).to("cpu", torch.int16)
        for i in range(0, len(captions), 256)
    ]
    counts = torch.tensor([0] + [len(clip.captions) for clip in clips])
    return TokenCache(
        semantic=torch.cat(semantic),
        acoustic=torch.cat(acoustic),
        audio_conditioning=torch.cat(conditioning),
        text_conditioning=torch.cat(text),
        first_caption=counts.cumsum(0),
    )
