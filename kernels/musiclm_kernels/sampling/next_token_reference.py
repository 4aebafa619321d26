"""The end of a decode step in plain PyTorch: head, draw, and the next step's input.

Dimensions: B rows, R rows and their guidance twins, D width, s residual streams, L levels (tables
that take turns), V tokens, V' embeddings.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.sampling import reference

NORM_EPSILON = 1e-5

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def exact_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """x @ weight.T in x's precision, weight[n] times weight_scale[n] if it is given."""
    product = F.linear(x, weight.to(x.dtype))
    return product if weight_scale is None else product * weight_scale.to(x.dtype)


def sample_next_token(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    embedding: Tensor,
    *,
    head_scale: Tensor | None = None,
    head_bias: Tensor | None = None,
    step: Tensor,
    seeds: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance_scale: float | None = None,
    allowed: Tensor | None = None,
    eos: int | None = None,
    eos_from: int = 0,
    finished: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """A token a row from x, which becomes the token's embedding. The counters are the kernel's."""
    return next_token(
        exact_product, x, norm_weight, norm_bias, head_weight, embedding, head_scale, head_bias,
        step, seeds, temperature, top_k, top_p, min_p, guidance_scale, allowed, eos, eos_from,
        finished,
    )  # fmt: skip


def next_token(
    product: Product,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    embedding: Tensor,
    head_scale: Tensor | None,
    head_bias: Tensor | None,
    step: Tensor,
    seeds: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    guidance_scale: float | None,
    allowed: Tensor | None,
    eos: int | None,
    eos_from: int,
    finished: Tensor | None,
) -> Tensor:
    """`sample_next_token` with this product of hidden states and head."""
    B, (L, V, D) = len(seeds), head_weight.shape
    level = step % L
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = (x if x.dim() == 2 else x.sum(1)).to(wide)
    bias = None if norm_bias is None else norm_bias.to(wide)
    hidden = F.layer_norm(rows, (D,), norm_weight.to(wide), bias, NORM_EPSILON)

    scale = None if head_scale is None else _at_level(head_scale, level)
    logits = product(hidden, _at_level(head_weight, level), scale)
    if head_bias is not None:
        logits = logits + _at_level(head_bias, level).to(wide)
    scores, unconditional = logits[:B], None if guidance_scale is None else logits[B:]
    if eos is not None:
        early = (torch.arange(V, device=x.device) == eos) & (step < eos_from)
        scores = scores.masked_fill(early, -torch.inf)
    tokens = reference.sample_logits(
        scores, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        guidance_scale=guidance_scale, unconditional=unconditional, seeds=seeds, step=step,
        allowed=None if allowed is None else _at_level(allowed, level),
    )  # fmt: skip

    if finished is not None and eos is not None:
        tokens = torch.where(finished, eos, tokens)
        finished.logical_or_(tokens.eq(eos))
    following = embedding.flatten(0, 1)[level * embedding.shape[1] + tokens].to(x.dtype)
    if x.dim() == 3:
        following = following[:, None]
    x.unflatten(0, (1 if guidance_scale is None else 2, B)).copy_(following)
    return tokens


def _at_level(table: Tensor, level: Tensor) -> Tensor:
    """table[level], without a copy where that does not wait for a device."""
    if len(table) == 1:
        return table[0]
    if table.device.type == "cpu" and not torch.compiler.is_compiling():
        return table[int(level)]
    if table.dtype == torch.float8_e4m3fn:  # PyTorch gathers no float8
        return table.view(torch.uint8).index_select(0, level.reshape(1))[0].view(table.dtype)
    return table.index_select(0, level.reshape(1))[0]
