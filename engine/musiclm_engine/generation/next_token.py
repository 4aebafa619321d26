"""The end of a step: the next token of each row, and its embedding as the next step's input."""

import torch
from torch import Tensor

from musiclm_engine.generation.decoder import Decoder
from musiclm_engine.generation.ops import StepOps
from musiclm_engine.generation.sampling import Sampling

FUSED_ROWS = 32  # that sample_next_token takes


def draw_next_token(
    decoder: Decoder,
    x: Tensor,
    *,
    step: Tensor,
    seeds: Tensor,
    sampling: Sampling,
    eos: int | None,
    finished: Tensor | None,
    counters: Tensor | None,
    ops: StepOps,
) -> Tensor:
    """One token a row from the last layer's output x [R, D] or [R, s, D], which becomes the
    embeddings of these tokens. One launch up to 32 rows; beyond, the product is a library's.

    Returns:
        [B] int64; R = B, or 2 B with guidance.
    """
    guided = sampling.guidance != 1.0
    settings = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "guidance_scale": sampling.guidance if guided else None,
    }
    if len(x) <= FUSED_ROWS:
        return ops.sample_next_token(
            x, decoder.norm.weight, decoder.norm.bias, decoder.head, decoder.embedding,
            head_scale=decoder.head_scale, head_bias=decoder.head_bias,
            step=step, seeds=seeds, eos=eos, finished=finished,
            counters=None if counters is None else counters[:1], **settings,
        )  # fmt: skip
    level = (step % len(decoder.head)).view(1)
    logits, _ = ops.decode_linear(
        x if x.dim() == 2 else x.sum(1), _at(decoder.head, level),
        weight_scale=None if decoder.head_scale is None else _at(decoder.head_scale, level),
        norm_weight=decoder.norm.weight, norm_bias=decoder.norm.bias, dtype=x.dtype,
    )  # fmt: skip
    if decoder.head_bias is not None:
        logits = logits + _at(decoder.head_bias, level)
    B = len(seeds)
    tokens = ops.sample_logits(
        logits[:B], unconditional=logits[B:] if guided else None,
        seeds=seeds, step=step, **settings,
    )  # fmt: skip
    if eos is not None and finished is not None:
        tokens = torch.where(finished, eos, tokens)
        finished |= tokens == eos
    embedded = _at(decoder.embedding, level)[tokens].to(x.dtype)
    if guided:
        embedded = torch.cat([embedded, embedded])
    x.copy_(embedded if x.dim() == 2 else embedded[:, None].expand_as(x))
    return tokens


def _at(tensor: Tensor, level: Tensor) -> Tensor:
    """tensor[level] without reading level back to the host, in float8 too."""
    if len(tensor) == 1:
        return tensor[0]
    if tensor.itemsize == 1:  # PyTorch gathers no float8
        return tensor.view(torch.uint8).index_select(0, level)[0].view(tensor.dtype)
    return tensor.index_select(0, level)[0]
