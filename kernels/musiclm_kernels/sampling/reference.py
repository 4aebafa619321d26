"""Sampling a token from logits, in plain PyTorch, by the float rule (docs/kernels/sampling.md).

A score is held as its deficit: how far it is below the row's largest, in units of the temperature;
0 for the largest, +inf for what is ruled out.
"""

import math

import torch
from torch import Tensor

from musiclm_kernels.philox import uniform
from musiclm_kernels.sampling.arithmetic_reference import TOP_P_BITS, fit, log, mass, top_p_in_bits

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
    step: int | Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """argmax of the filtered logits plus Gumbel noise: a draw from their softmax.

    Guidance, allowed, temperature, top_k, top_p, min_p, noise, in this order; in fp32 by the float
    rule, float64 by PyTorch's own functions.
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
    deficits = _deficits(scores, temperature)
    if 0 < top_k < scores.shape[1]:
        deficits = _drop_above(deficits, deficits.topk(top_k, largest=False).values[:, -1:])
    if top_p < 1:
        deficits = _drop_above(deficits, _nucleus_threshold(deficits, top_p))
    if min_p > 0:
        deficits = _drop_above(deficits, largest_deficit(min_p))
    # Least of deficit - noise: noise is -log(-log(uniform)).
    return (log(-log(_draws(seeds, step, scores))) + deficits).argmin(-1)


def inverse_temperature(temperature: float, dtype: torch.dtype = torch.float32) -> float:
    """What deficits are multiplied by: never infinite, so that the largest score's stays 0, and
    never 0, so that what is ruled out stays so."""
    limits = torch.finfo(dtype)
    return min(max(1 / temperature, limits.tiny), limits.max)


def largest_deficit(min_p: float) -> float:
    """Of a token that is min_p times as probable as the likeliest."""
    return -math.log(min_p)


def _deficits(scores: Tensor, temperature: float) -> Tensor:
    limits = torch.finfo(scores.dtype)
    scores = scores.clamp_max(limits.max)
    # Finite also where nothing is allowed: -inf - -inf is NaN.
    peak = scores.amax(-1, keepdim=True).clamp_min(limits.min)
    # abs: no zero has a sign, so that deficits can be compared by their bits.
    return (peak - scores).abs() * inverse_temperature(temperature, scores.dtype)


def _drop_above(deficits: Tensor, threshold: Tensor | float) -> Tensor:
    return deficits.masked_fill(deficits > threshold, torch.inf)


def _nucleus_threshold(deficits: Tensor, top_p: float) -> Tensor:
    """[B, 1]: the highest deficit among the fewest tokens whose mass reaches top_p of all."""
    ranked = deficits.sort().values
    masses = fit(mass(ranked))
    reached = masses.cumsum(-1)
    total = reached[:, -1:]
    if deficits.dtype == torch.float64:
        wanted = top_p * total
    else:
        wanted = (top_p_in_bits(top_p) * total + (2**TOP_P_BITS - 1)) >> TOP_P_BITS
    last = (reached - masses < wanted).sum(-1, keepdim=True) - 1
    return ranked.gather(-1, last.clamp_min(0))


def _draws(seeds: Tensor, step: int | Tensor, scores: Tensor) -> Tensor:
    """[B, V]: uniform numbers inside (0, 1), in the dtype of scores."""
    V = scores.shape[1]
    if isinstance(step, Tensor):
        step = step.reshape(-1, 1)
    columns = step * V + torch.arange(V, device=scores.device)
    return uniform(seeds[:, None], columns).clamp_min(SMALLEST_UNIFORM).to(scores.dtype)
