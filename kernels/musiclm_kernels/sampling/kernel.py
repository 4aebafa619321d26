"""Sampling from logits in Triton: a program draws one row, which it holds in registers whole.

Dimensions: B rows, V tokens. Reads B * V logits once, twice with guidance: the floor is the launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.sampling.arithmetic_reference import top_p_in_bits
from musiclm_kernels.sampling.reference import inverse_temperature, largest_deficit
from musiclm_kernels.sampling.tile import draw, guide, minus_noise

MAX_V = 16384  # one row in the registers of eight warps
FEW_V = 2048  # one row in those of four


class Filters(NamedTuple):
    """The filters as a kernel takes them: numbers, and whether each is on."""

    inverse_temperature: float
    top_k: int
    top_p: int
    largest_deficit: float
    constants: dict[str, bool]

    @classmethod
    def of(cls, V: int, temperature: float, top_k: int, top_p: float, min_p: float) -> "Filters":
        drawn = temperature > 0
        return cls(
            inverse_temperature(temperature) if drawn else 0.0,
            min(top_k, V),
            top_p_in_bits(top_p),
            largest_deficit(min_p) if min_p > 0 else 0.0,
            {
                "GREEDY": not drawn,
                "TOP_K": drawn and 0 < top_k < V,
                "TOP_P": drawn and top_p < 1,
                "MIN_P": drawn and min_p > 0,
            },
        )


@triton.jit(do_not_specialize=["step", "top_k", "top_p"])
def _sample_logits(
    logits_ptr,  # [B, V], rows packed
    unconditional_ptr,  # [B, V], rows packed, or None
    allowed_ptr,  # [V] or [B, V] uint8, rows packed, or None
    seeds_ptr,  # [B], strided
    steps_ptr,  # [] or [B], or None
    tokens_ptr,  # [B]
    V,
    step,
    stride_logits,
    stride_unconditional,
    stride_allowed,
    stride_seeds,
    stride_steps,
    guidance_scale,
    inverse_temperature,
    top_k,
    top_p,
    largest_deficit,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_V)[None, :]
    inside = columns < V
    minus_infinity = float("-inf")

    scores = tl.load(logits_ptr + row * stride_logits + columns, mask=inside, other=minus_infinity)
    scores = scores.to(tl.float32)
    if unconditional_ptr is not None:
        place = unconditional_ptr + row * stride_unconditional + columns
        unconditional = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        scores = guide(scores, unconditional, guidance_scale)
    if allowed_ptr is not None:
        place = allowed_ptr + row * stride_allowed + columns
        scores = tl.where(tl.load(place, mask=inside, other=0) != 0, scores, minus_infinity)
    if GREEDY:
        token = tl.argmax(scores, 1)
    else:
        seed = tl.load(seeds_ptr + row * stride_seeds)
        draw_number = tl.cast(step, tl.int64)
        if steps_ptr is not None:
            draw_number = tl.load(steps_ptr + row * stride_steps)
        noise = minus_noise(seed, draw_number * V + columns)
        token = draw(
            scores, noise, inverse_temperature, top_k, top_p, largest_deficit, TOP_K, TOP_P, MIN_P
        )
    tl.store(tokens_ptr + row + tl.arange(0, 1), token.to(tl.int64))


def sample_logits(
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
    """The op's body on CUDA: see op.py."""
    B, V = logits.shape
    if V > MAX_V:
        raise ValueError(f"logits has {V} columns, wanted at most {MAX_V} on {logits.device}")
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logits = _rows_packed(logits)
    unconditional = None if unconditional is None else _rows_packed(unconditional)
    allowed = None if allowed is None else _rows_packed(allowed).view(torch.uint8)
    block_v = triton.next_power_of_2(V)
    filters = Filters.of(V, temperature, top_k, top_p, min_p)
    if B:
        _sample_logits[(B,)](
            logits, unconditional, allowed, seeds, steps, tokens,
            V, step, logits.stride(0), _row_stride(unconditional), _row_stride(allowed),
            seeds.stride(0), _row_stride(steps, of_rows=1),
            0.0 if guidance_scale is None else guidance_scale, *filters[:-1],
            BLOCK_V=block_v, num_warps=4 if V <= FEW_V else 8,
            enable_fp_fusion=False, **filters.constants,
        )  # fmt: skip
    return tokens


def _rows_packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_stride(x: Tensor | None, of_rows: int = 2) -> int:
    """From one row's to the next; 0 where the rows share one."""
    return x.stride(0) if x is not None and x.dim() == of_rows else 0
