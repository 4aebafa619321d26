"""The tempo of what a stage with a clock will decode."""

import torch
from torch import Tensor

from musiclm_engine.audiolm.beat_clock import NUM_TEMPI
from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.generation.sampling import Sampling, derive_seeds
from musiclm_kernels import sample_logits

SHARPENING = 3.0  # of p: what is unlikely is mostly what the conditioning is vague about
NEARBY = 3  # tokens: 5 %


@torch.inference_mode()
def choose_tempo(
    stage: Stage, *, conditioning: Tensor, prefix: Tensor, seeds: Tensor, sampling: Sampling
) -> Tensor | None:
    """A tempo for each row: drawn, or, where frames are given, the likeliest one.

    The conditioning tells a tempo to a few per cent: p has a hill there, whose mean is nearer to what
    was said than any draw from it. So which hill is drawn, from p sharpened, and then its mean is taken.

    Args:
        stage: in evaluation mode, without context.
        conditioning: [B, M] int64.
        prefix: [B, P, Lt] int64, frames that are given.
        seeds: [B] int64.
        sampling: whose temperature counts; 0 takes the likeliest.

    Returns:
        [B] int64, or None for a stage without a clock.
    """
    if stage.clock is None:
        return None
    logits = stage.tempo_logits(conditioning)
    if prefix.shape[1] > 0:
        return torch.stack(
            [
                (of_row.log_softmax(-1) + _log_likelihoods(stage, row[None], frames[None])).argmax()
                for of_row, row, frames in zip(logits, conditioning, prefix, strict=True)
            ]
        )
    drawn = sample_logits(
        logits.float(),
        seeds=torch.cat([derive_seeds(int(seed), "tempo", count=1) for seed in seeds]).to(
            seeds.device
        ),
        step=0,
        temperature=sampling.temperature / SHARPENING,
    )
    return _mean_nearby(logits.float().softmax(-1), drawn)


def _mean_nearby(p: Tensor, tempo: Tensor) -> Tensor:
    """The mean of p [B, NUM_TEMPI] within NEARBY tokens of each of tempo [B], to the next token."""
    tokens = torch.arange(NUM_TEMPI, device=p.device)
    p = p * ((tokens - tempo[:, None]).abs() <= NEARBY)
    return torch.round((p * tokens).sum(1) / p.sum(1)).long()


def _log_likelihoods(stage: Stage, conditioning: Tensor, frames: Tensor) -> Tensor:
    """[NUM_TEMPI] log p(frames [1, P, Lt] | tempo, conditioning [1, M])."""
    tempi = torch.arange(NUM_TEMPI, device=frames.device)
    logits = stage(
        conditioning.expand(NUM_TEMPI, -1), None, frames.expand(NUM_TEMPI, -1, -1), tempi
    )
    chosen = frames.expand(NUM_TEMPI, -1, -1)[..., None]
    return logits.float().log_softmax(-1).gather(-1, chosen).sum((1, 2, 3))
