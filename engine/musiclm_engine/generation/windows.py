"""Sequences longer than a stage was trained on: windows that overlap, or stand side by side."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.generation.decode import Progress, check_seeds, decode_stage
from musiclm_engine.generation.sampling import Sampling, derive_seeds
from musiclm_engine.generation.stage_steps import Decoding, StageSteps


def decode_overlapping(
    stage: Stage,
    *,
    conditioning: Tensor,
    context: Tensor | None,
    frames: int,
    window: int,
    seeds: Tensor,
    sampling: Sampling,
    tempo: Tensor | None = None,
    decoding: Decoding | None = None,
    steps: StageSteps | None = None,
    on_tokens: Progress | None = None,
) -> Tensor:
    """Windows one after another, each begun with the second half of the one before.

    MusicLM does so with half of its 30 s (section 4, "Long generation"): what is heard at a seam
    was heard before it.

    Args:
        conditioning: [B, M]; context: [B, Tc, Lc] of the whole piece, or None.
        frames: of target in the whole piece.
        window: frames of target a window holds at most, a multiple of the context's stride.
        seeds: [B].
        sampling, tempo, decoding, steps, on_tokens: see `decode_stage`.

    Returns:
        [B, frames, Lt] int64.
    """
    check_seeds(seeds)
    stride = stage.context_stride
    if window < 1 or window % stride:
        raise ValueError(f"window is {window} frames, wanted a multiple of {stride}, at least that")
    overlap = window // 2 // stride * stride
    tokens = torch.zeros(
        len(conditioning), 0, stage.target_levels, dtype=torch.int64, device=conditioning.device
    )
    while tokens.shape[1] < frames:
        start = max(0, tokens.shape[1] - overlap)
        end = min(start + window, frames)
        piece = decode_stage(
            stage,
            conditioning=conditioning,
            context=None if context is None else context[:, start // stride : -(-end // stride)],
            prefix=tokens[:, start:],
            frames=end - start,
            seeds=torch.cat([derive_seeds(int(s), start, count=1) for s in seeds]).to(seeds.device),
            sampling=sampling,
            tempo=tempo,
            capacity=window,
            decoding=decoding,
            steps=steps,
            on_tokens=on_tokens,
        )
        tokens = torch.cat([tokens[:, :start], piece], dim=1)
    return tokens


def decode_side_by_side(
    stage: Stage,
    *,
    conditioning: Tensor,
    context: Tensor,
    window: int,
    seeds: Tensor,
    sampling: Sampling,
    decoding: Decoding | None = None,
    steps: StageSteps | None = None,
    on_tokens: Progress | None = None,
) -> Tensor:
    """All windows of all rows as one batch: each depends on its own stretch of context alone.

    Args:
        conditioning: [B, M].
        context: [B, T, Lc], as many frames as the target will have.
        window: frames a window holds.
        seeds: [B].
        sampling, decoding, steps, on_tokens: see `decode_stage`.

    Returns:
        [B, T, Lt] int64.
    """
    check_seeds(seeds)
    if window < 1:
        raise ValueError(f"window is {window} frames, wanted at least 1")
    B, frames, _ = context.shape
    window = min(window, frames)
    # The last window is filled up with its own last frame; what comes of that is cut off.
    padded = F.pad(context.transpose(1, 2), (0, -frames % window), mode="replicate")
    windows = rearrange(padded, "b l (w t) -> (b w) t l", t=window)
    count = len(windows) // B
    tokens = decode_stage(
        stage,
        conditioning=conditioning.repeat_interleave(count, dim=0),
        context=windows,
        prefix=windows.new_zeros(len(windows), 0, stage.target_levels),
        frames=window,
        seeds=torch.cat([derive_seeds(int(s), "window", count=count) for s in seeds]).to(
            seeds.device
        ),
        sampling=sampling,
        decoding=decoding,
        steps=steps,
        on_tokens=on_tokens,
    )
    return rearrange(tokens, "(b w) t l -> b (w t) l", b=B)[:, :frames]
