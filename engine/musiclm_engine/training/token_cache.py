"""All clips as tokens, made once: the stages never see audio in training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.audiolm.clustered import ClusteredTokens
from musiclm_engine.checkpoint import read_tensors, write_tensors
from musiclm_engine.codec import Codec
from musiclm_engine.mulan import MuLaN, MuLaNEmbedQuantizer

CAPTIONS_AT_A_TIME = 256


@dataclass(frozen=True)
class TokenCache:
    """Tokens of N clips of equal length.

    Attributes:
        semantic: [N, S] int16.
        acoustic: [N, T, Q] int16.
        audio_conditioning: [N, M] int16, MuLan tokens of the clip's audio.
        text_conditioning: [captions, M] int16, of all captions of all clips.
        first_caption: [N + 1] int64: clip n's captions are rows first[n] to first[n + 1].
        tempo_bpm: [N] float32, 0 where it is not known.
    """

    semantic: Tensor
    acoustic: Tensor
    audio_conditioning: Tensor
    text_conditioning: Tensor
    first_caption: Tensor
    tempo_bpm: Tensor

    @classmethod
    def load(cls, path: Path, device: torch.device | None = None) -> "TokenCache":
        tensors = read_tensors(path)
        if set(tensors) != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is of another version: remove it, and it is made again")
        return cls(**{name: value.to(device) for name, value in tensors.items()})

    @classmethod
    def joined(cls, parts: "list[TokenCache]") -> "TokenCache":
        """The clips of all parts, one after another."""
        rows = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in (field.name for field in fields(TokenCache))
            if name != "first_caption"
        }
        counts = torch.cat([part.first_caption.diff() for part in parts])
        return cls(**rows, first_caption=torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def save(self, path: Path) -> None:
        write_tensors(path, vars(self))

    def batch(
        self, *, size: int, frames: int, stride: int, text_share: float, seed: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A batch that depends on seed and step alone.

        Args:
            size: B.
            frames: T of codec frames to crop, a multiple of stride.
            stride: codec frames a semantic token lasts.
            text_share: of rows conditioned on a caption; the others on their audio.

        Returns:
            conditioning [B, M], semantic [B, T / stride], acoustic [B, T, Q], all int64, and
            tempo_bpm [B].

        Raises:
            ValueError: the clips are shorter than the crop, or it holds no semantic token.
        """
        longest = min(self.semantic.shape[1], self.acoustic.shape[1] // stride)
        if not 1 <= frames // stride <= longest:
            raise ValueError(
                f"a crop is {frames} frames, wanted {stride} to {longest * stride}, "
                "as many as the shortest clip has: mind crop_seconds"
            )
        random = np.random.default_rng((seed, step))
        drawn = [
            random.integers(len(self.semantic), size=size),
            random.integers(longest - frames // stride + 1, size=size),
            random.integers(2**32, size=size),
            random.random(size) < text_share,
        ]
        device = self.semantic.device  # one small copy there, which a GPU need not wait for
        clip, start, draw, from_text = torch.from_numpy(np.stack(drawn)).to(
            device, non_blocking=True
        )
        first, last = self.first_caption[clip], self.first_caption[clip + 1]
        conditioning = torch.where(
            from_text.bool()[:, None],
            self.text_conditioning[first + draw % (last - first)],
            self.audio_conditioning[clip],
        )
        moments = start[:, None] + torch.arange(frames // stride, device=device)
        acoustic = start[:, None] * stride + torch.arange(frames, device=device)
        return (
            conditioning.long(),
            self.semantic[clip[:, None], moments].long(),
            self.acoustic[clip[:, None], acoustic].long(),
            self.tempo_bpm[clip],
        )


@torch.inference_mode()
def tokenize_clips(
    audio: Iterable[Tensor],
    captions: list[tuple[str, ...]],
    *,
    tempo_bpm: list[float],
    codec: Codec,
    tokenizer: ClusteredTokens,
    mulan: MuLaN,
    quantizer: MuLaNEmbedQuantizer,
    on_progress: Callable[[int, int], None] | None = None,
) -> TokenCache:
    """Run everything that makes tokens over clips.

    Args:
        audio: [B, samples] of some clips after others, all equally long, where the models are.
        captions: of each clip.
        tempo_bpm: of each clip, 0 where it is not known.
        on_progress: called with how many clips are done, of how many.
    """
    semantic, acoustic, conditioning = [], [], []
    done = 0
    for some in audio:
        acoustic.append(codec.encode(some).to("cpu", torch.int16))
        semantic.append(tokenizer.encode(some).to("cpu", torch.int16))
        conditioning.append(quantizer.encode(mulan.embed_audio(some)).to("cpu", torch.int16))
        done += len(some)
        if on_progress is not None:
            on_progress(done, len(captions))
    texts = [caption for of_clip in captions for caption in of_clip]
    text = [
        quantizer.encode(mulan.embed_text(texts[i : i + CAPTIONS_AT_A_TIME])).to("cpu", torch.int16)
        for i in range(0, len(texts), CAPTIONS_AT_A_TIME)
    ]
    counts = torch.tensor([0] + [len(of_clip) for of_clip in captions])
    return TokenCache(
        semantic=torch.cat(semantic),
        acoustic=torch.cat(acoustic),
        audio_conditioning=torch.cat(conditioning),
        text_conditioning=torch.cat(text),
        first_caption=counts.cumsum(0),
        tempo_bpm=torch.tensor(tempo_bpm),
    )
