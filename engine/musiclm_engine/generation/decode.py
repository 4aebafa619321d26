"""The decode loop: one stage, a batch of rows, tokens drawn one after another."""

from collections.abc import Callable

import torch
from torch import Tensor

from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.generation.sampling import Sampling
from musiclm_kernels import sample_logits

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
        frames: T > P.
        seeds: [B] int64. A row's tokens depend on its seed, its inputs and nothing else.

    Returns:
        [B, T, Lt] int64, prefix included.
    """
    B, given, levels = prefix.shape
    guided = sampling.guidance != 1.0
    tokens = torch.cat([prefix, prefix.new_zeros(B, frames - given, levels)], dim=1).view(B, -1)

    def with_twins(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows]) if guided else rows

    unconditional = torch.full_like(conditioning, stage.null)
    logits, cache = stage.prefill(
        torch.cat([conditioning, unconditional]) if guided else conditioning,
        None if context is None else with_twins(context),
        with_twins(prefix),
        frames,
    )
    table = stage.position.table()
    for index in range(given * levels, frames * levels):
        drawn = sample_logits(
            logits[:B],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            guidance_scale=sampling.guidance if guided else None,
            unconditional=logits[B:] if guided else None,
            seeds=seeds,
            step=index,
        )
        tokens[:, index] = drawn
        if on_tokens is not None:
            on_tokens(1)
        if index + 1 < frames * levels:
            logits = stage.step(with_twins(drawn), index, table, cache)
    return tokens.view(B, frames, levels)
