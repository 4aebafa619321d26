"""Clips as the tokens that the semantic stage knows them by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.checkpoint import read_tensors, write_tensors
from musiclm_engine.data.manifest import Clip
from musiclm_engine.evaluation.bench import Bench
from musiclm_engine.evaluation.memorisation import Continued
from musiclm_engine.generation import derive_seeds

CLIPS_PER_FILE = 64
CLIPS_PER_BATCH = 8


def semantic_tokens(bench: Bench, clips: Sequence[Clip], *, manifest_sha256: str) -> Tensor:
    """Tokens [n, S] of all clips of a manifest's split; the shortest sets the length of all."""
    seconds = min(clip.seconds for clip in clips)
    tokens = []
    for first in range(0, len(clips), CLIPS_PER_FILE):
        some = clips[first : first + CLIPS_PER_FILE]
        key = (bench.model_sha256, manifest_sha256, clips[0].split, first)
        path = bench.work.stem("tokens", *key).with_suffix(".safetensors")
        if not path.exists():
            encoded = bench.model.tokenizer.encode(bench.audio(some, seconds))
            write_tensors(path, {"semantic": encoded})
        tokens.append(read_tensors(path)["semantic"])
        bench.progress("tokens", first + len(some), len(clips))
    return torch.cat(tokens)


@torch.inference_mode()
def clips_to_continue(bench: Bench, clips: Sequence[Clip], *, count: int, seed: int) -> Continued:
    """A random choice of clips, with their conditioning, their tokens, and the likeliest tempi of
    their first captions."""
    order = np.random.default_rng(seed).permutation(len(clips))[:count]
    chosen = [clips[index] for index in order]
    seconds = min(clip.seconds for clip in chosen)
    conditioning, semantic = [], []
    for first in range(0, len(chosen), CLIPS_PER_BATCH):
        audio = bench.audio(chosen[first : first + CLIPS_PER_BATCH], seconds)
        conditioning.append(
            bench.model.quantizer.encode(bench.model.mulan.embed_audio(audio)).cpu()
        )
        semantic.append(bench.model.tokenizer.encode(audio).cpu())
        bench.progress(f"{chosen[0].split} clips", first + len(audio), len(chosen))
    tempo = bench.model.choose_tempo(
        [clip.captions[0] for clip in chosen],
        derive_seeds(seed, count=len(chosen)),
        temperature=0.0,
    )
    return Continued(
        [clip.piece for clip in chosen],
        torch.cat(conditioning),
        torch.cat(semantic),
        None if tempo is None else tempo.cpu(),
    )
