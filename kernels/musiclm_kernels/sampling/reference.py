"""Sampling a token from logits, in plain PyTorch."""

import math

import torch
from torch import Tensor

from musiclm_kernels.philox import uniform

SMALLEST_UNIFORM = 2.0**-33  # under every draw but zero: keeps the Gumbel noise finite


def sample_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance_scale: float | None = None,
    unconditional: Tensor | None = None,
    seeds: Tensor,
    step: int,
    allowed: Tensor | None = None,
) -> Tensor:
    """argmax of the filtered logits plus Gumbel noise: a draw from their softmax.

    Guidance, allowed, temperature, top_k, top_p, min_p, noise, in this order, in at least fp32.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if unconditional is not None and guidance_scale is not None:
        base = unconditional.to(scores.dtype)
        ruled_out = scores.isneginf()
        scores = base + guidance_scale * (scores - base)
        scores = scores.masked_fill(ruled_out, -torch.inf)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        return scores.argmax(-1)
    # From the largest down, so that no temperature, however small, makes the largest overflow.
    scores = (scores - _finite_peak(scores)) / max(temperature, torch.finfo(scores.dtype).tiny)
    if 0 < top_k < scores.shape[1]:
        scores = _drop_below(scores, scores.topk(top_k).values[:, -1:])
    if top_p < 1:
        scores = _drop_below(scores, _nucleus_threshold(scores, top_p))
    if min_p > 0:
        scores = _drop_below(scores, scores.amax(-1, keepdim=True) + math.log(min_p))
    return (scores + _gumbel(seeds, step, scores)).argmax(-1)


def _finite_peak(scores: Tensor) -> Tensor:
    """[B, 1]: the largest score; finite also where nothing is allowed, as -inf - -inf is NaN."""
    limits = torch.finfo(scores.dtype)
    return scores.amax(-1, keepdim=True).clamp(limits.min, limits.max)


def _drop_below(scores: Tensor, threshold: Tensor) -> Tensor:
    return scores.masked_fill(scores < threshold, -torch.inf)


def _nucleus_threshold(scores: Tensor, top_p: float) -> Tensor:
    """[B, 1]: the lowest score among the fewest tokens whose probabilities reach top_p."""
    ranked = scores.sort(descending=True).values
    probabilities = ranked.softmax(-1)
    above = probabilities.cumsum(-1) - probabilities  # what outranks each token
    last = (above < top_p).sum(-1, keepdim=True) - 1
    return ranked.gather(-1, last.clamp_min(0))


def _gumbel(seeds: Tensor, step: int, scores: Tensor) -> Tensor:
    V = scores.shape[1]
    columns = torch.arange(step * V, (step + 1) * V, device=scores.device)
    draws = uniform(seeds[:, None], columns).clamp_min(SMALLEST_UNIFORM)
    return -(-draws.log()).log()
