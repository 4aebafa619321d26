"""Decoding a stage: what is given is taken in at once, then tokens are drawn one after another."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.generation.sampling import Sampling
from musiclm_engine.generation.stage_steps import Decoding, StageSteps, checked_decoding

Progress = Callable[[int], None]  # called with the number of tokens a row has gained


@torch.inference_mode()
def decode_stage(
    stage: Stage,
    *,
    conditioning: Tensor,
    context: Tensor | None,
    prefix: Tensor,
    frames: int,
    seeds: Tensor,
    sampling: Sampling,
    tempo: Tensor | None = None,
    capacity: int | None = None,
    decoding: Decoding | None = None,
    steps: StageSteps | None = None,
    on_tokens: Progress | None = None,
) -> Tensor:
    """Continue prefix to `frames` frames.

    With guidance, each row has a twin without conditioning in the same batch, so weights are read
    once for both.

    Args:
        stage: in evaluation mode.
        conditioning: [B, M] int64.
        context: [B, Tc, Lc] int64, or None.
        prefix: [B, P, Lt] int64, frames that are given.
        frames: T >= P.
        seeds: [B] int64. A row's tokens depend on its seed, its inputs and nothing else.
        sampling: settings of the draw.
        tempo: [B] int64, for a stage with a clock, else None.
        capacity: frames, of context and of target, that the buffers are made for; T if None.
            Steps of equal capacity are the same launches, and a GPU's sums round alike in them.
        decoding: precision, and how a step runs.
        steps: where a step is taken from if one fits, and left afterwards.
        on_tokens: called after each step.

    Returns:
        [B, T, Lt] int64, prefix included.

    Raises:
        ValueError: an argument is not as above.
        TypeError: decoding is no `Decoding`.
    """
    B, given, levels = prefix.shape
    check_seeds(seeds)
    stage.check(conditioning, context, prefix, tempo)
    decoding = checked_decoding(decoding)
    if frames < given:
        raise ValueError(f"frames is {frames}, wanted at least the {given} of prefix")
    stage.check_span(frames)
    if given == frames:
        return prefix
    context_frames = 0 if context is None else context.shape[1]
    capacity = max(capacity or 0, frames)
    room = max(-(-capacity // stage.context_stride), context_frames) if stage.context_levels else 0
    with (steps or StageSteps()).borrow(
        stage,
        rows=B,
        length=stage.sequence_length(room, capacity),
        sampling=sampling,
        decoding=decoding,
    ) as step:
        if sampling.guidance != 1.0:
            unconditional = torch.full_like(conditioning, stage.null)
            conditioning = torch.cat([conditioning, unconditional])
            context = None if context is None else context.repeat(2, 1, 1)
            prefix = prefix.repeat(2, 1, 1)
            tempo = None if tempo is None else tempo.repeat(2)
        x = stage.prefill(conditioning, context, prefix, step.cache.append, tempo)
        query_codes, key_codes = (
            F.pad(codes, (0, step.length - codes.shape[1]))
            for codes in stage.codes(context_frames, frames, tempo)
        )
        step.begin(
            x,
            seeds=seeds,
            position=stage.sequence_length(context_frames, given) - 1,
            number=given * levels,
            query_codes=query_codes,
            key_codes=key_codes,
        )
        for _ in range((frames - given) * levels):
            step()
            if on_tokens is not None:
                on_tokens(1)
        drawn = step.tokens[:, given * levels :].unflatten(1, (-1, levels))
        return torch.cat([prefix[:B], drawn], dim=1)


def check_seeds(seeds: Tensor) -> None:
    """Refuse what would be cut to whole numbers: 0.9 would draw as 0 does."""
    if seeds.dtype != torch.int64:
        raise ValueError(f"seeds are {seeds.dtype}, wanted int64")
