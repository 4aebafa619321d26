"""Sampling from logits as a PyTorch op: schema, shape rule, and the public function."""

import math
from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import (
    FLOATS,
    check_device,
    check_dims,
    check_dtype,
    check_finite,
    check_shape,
)
from musiclm_kernels.registry import define_op, inlines_on_cpu, without_autocast
from musiclm_kernels.sampling import reference

TOP_K_LIMIT = 2**63  # the schema holds it in an int64


def _body(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    guidance_scale: float | None,
    unconditional: Tensor | None,
    seeds: Tensor,
    step: int,
    steps: Tensor | None,
    allowed: Tensor | None,
) -> Tensor:
    return reference.sample_logits(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        guidance_scale=guidance_scale, unconditional=unconditional,
        seeds=seeds, step=step if steps is None else steps, allowed=allowed,
    )  # fmt: skip


def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_sample_logits = define_op(
    "sample_logits",
    "(Tensor logits, float temperature, SymInt top_k, float top_p, float min_p, "
    "float? guidance_scale, Tensor? unconditional, Tensor seeds, SymInt step, Tensor? steps, "
    "Tensor? allowed) -> Tensor",
    _body,
    _fake,
    kernel="musiclm_kernels.sampling.kernel:sample_logits",
)


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
    """Draw one token a row: argmax of the filtered logits plus Gumbel noise.

    In this order: guidance (unconditional + guidance_scale * (logits - unconditional)), allowed,
    temperature, top_k, top_p, min_p, the draw. A filter keeps the tokens that equal its threshold,
    so ties are never cut. The noise of column c is made from the Philox uniform at
    (seeds[b], step * V + c): row b depends on row b, seeds[b] and step, on nothing else in the
    batch and on no generator. From float32 logits or narrower ones every device draws the same
    token, exactly: docs/kernels/sampling.md says how. Not differentiable.

    Args:
        logits: [B, V], any float dtype, no NaN; -inf rules a token out. On CUDA V is up to 16384,
            unless in float64.
        temperature: divides the logits, finite; 0 takes the largest, the lowest index on ties.
        top_k: keep the k largest; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities sum to at least this, in (0, 1].
        min_p: keep tokens at least this times as probable as the likeliest, in [0, 1].
        guidance_scale: finite, needed with unconditional and only then; 1 gives logits back, 0
            unconditional.
        unconditional: [B, V], the logits without the condition, finite, in the dtype of logits.
        seeds: [B] int64, one per row.
        step: which draw of these seeds this is, from 0 up; an int, or int64 [] or [B] on the
            device, whose values are not looked at.
        allowed: [V] or [B, V] bool, True where a token may be drawn. A row that allows nothing
            gives token 0: looking would need a synchronisation.

    Returns:
        [B] int64. Computed in fp32, and top_p's sums in integers; float64 logits in fp64.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or a number is outside
            its range.

    Source: top-p: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al., arXiv 2407.01082;
    guidance: Ho and Salimans, arXiv 2207.12598, on logits.
    """
    check_dims("logits", logits, "B V")
    check_dtype("logits", logits, *FLOATS)
    B, V = logits.shape
    if V == 0:
        raise ValueError(f"logits has shape {(B, V)}, wanted at least one column")
    check_filters(temperature, top_k, top_p, min_p)
    if (guidance_scale is None) != (unconditional is None):
        missing = "unconditional" if unconditional is None else "guidance_scale"
        raise ValueError(f"{missing} is None, wanted with its partner: both or neither")
    if guidance_scale is not None:
        check_finite("guidance_scale", guidance_scale)
    if unconditional is not None:
        check_shape("unconditional", unconditional, B, V)
        check_dtype("unconditional", unconditional, logits.dtype)
        check_device("unconditional", unconditional, logits.device)
        unconditional = unconditional.detach()
    check_shape("seeds", seeds, B)
    check_dtype("seeds", seeds, torch.int64)
    check_device("seeds", seeds, logits.device)
    number, steps = 0, None
    if isinstance(step, Tensor):
        if step.shape not in ((), (B,)):
            raise ValueError(f"step has shape {tuple(step.shape)}, wanted () or {(B,)}")
        check_dtype("step", step, torch.int64)
        check_device("step", step, logits.device)
        steps = step
    elif step < 0:
        raise ValueError(f"step is {step}, wanted 0 or more")
    else:
        number = step
    if allowed is not None:
        if allowed.shape not in ((V,), (B, V)):
            raise ValueError(f"allowed has shape {tuple(allowed.shape)}, wanted {(V,)} or {(B, V)}")
        check_dtype("allowed", allowed, torch.bool)
        check_device("allowed", allowed, logits.device)
    # A compiler that saw 16-bit logits being made would leave out their rounding.
    inlined = inlines_on_cpu(logits) and logits.itemsize >= 4
    run = without_autocast(_body) if inlined else _sample_logits
    return run(
        logits.detach(), temperature, top_k, top_p, min_p,
        guidance_scale, unconditional, seeds, number, steps, allowed,
    )  # fmt: skip


def check_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, wanted a finite number, 0 or more")
    if not 0 <= top_k < TOP_K_LIMIT:
        raise ValueError(f"top_k is {top_k}, wanted 0 (off) or more, below 2**63")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, wanted within (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}, wanted within [0, 1]")
