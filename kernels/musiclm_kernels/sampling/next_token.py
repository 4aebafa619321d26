"""The end of a decode step in Triton: one launch, in two parts.

A program computes the logits of BLOCK_N tokens of the vocabulary for all rows, and their noise: its
weights are in registers, read once. The last program to finish draws for all rows from what the
others left in memory, and writes the tokens' embeddings over the residual stream, which by then all
have read.

Dimensions: B rows, R rows and their guidance twins, D width, s residual streams, L levels, V
tokens, V' embeddings. Reads V * D weights: 2 MB of bfloat16 for 1024 tokens of width 1024.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.sampling.kernel import Filters
from musiclm_kernels.sampling.next_token_reference import NORM_EPSILON
from musiclm_kernels.sampling.tile import draw, guide, minus_noise
from musiclm_kernels.target import check_float8, dependent_launch

MAX_V, MAX_D = 8192, 4096
# A thread's share of the weights, and of the scores of the rows that are drawn together.
WEIGHTS_PER_THREAD = 64
SCORES_PER_THREAD = 32
NORM_ROWS, NOISE_ROWS = 2, 16  # that go through the head, and get their noise, together


@triton.jit
def _load_rows(x_ptr, rows, d, D: tl.constexpr, NUM_STREAMS: tl.constexpr):
    """[NORM_ROWS, BLOCK_D]: the sum of each row's streams."""
    ptr = x_ptr + rows.to(tl.int64)[:, None] * (NUM_STREAMS * D) + d[None, :]
    total = tl.load(ptr, mask=(d < D)[None, :], other=0.0)
    for stream in tl.static_range(1, NUM_STREAMS):
        total += tl.load(ptr + stream * D, mask=(d < D)[None, :], other=0.0)
    return total


@triton.jit(do_not_specialize=["eos", "eos_from", "top_k", "top_p"])
def _sample_next_token(
    x_ptr,  # [R, s, D], packed
    norm_weight_ptr,  # [D]
    norm_bias_ptr,  # [D] or None
    head_ptr,  # [L, V, D], packed
    embedding_ptr,  # [L, V', D], packed
    head_scale_ptr,  # [L, V], packed, or None
    head_bias_ptr,  # [L, V], packed, or None
    allowed_ptr,  # [L, V] uint8, packed, or None
    step_ptr,  # []
    seeds_ptr,  # [B], packed
    finished_ptr,  # [B] uint8, packed, or None
    logits_ptr,  # [R, V], packed
    noise_ptr,  # [B, V], packed
    counter_ptr,  # [1]
    tokens_ptr,  # [B]
    B,
    R,
    V,
    num_embeddings,
    eos,
    eos_from,
    guidance_scale,
    inverse_temperature,
    top_k,
    top_p,
    largest_deficit,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    GUIDED: tl.constexpr,
    EOS: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    NUM_STREAMS: tl.constexpr,
    NORM_EPSILON: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    NOISE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_vocabulary = columns < V
    n = tl.minimum(columns, V - 1).to(tl.int64)
    norm_weight = tl.load(norm_weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    norm_bias = tl.zeros_like(norm_weight)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    weight_ptrs = head_ptr + n[:, None] * D + d[None, :]
    if L == 1:  # else the step says which, and the kernel before may have written it
        weights = tl.load(weight_ptrs, mask=(d < D)[None, :])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    step = tl.load(step_ptr)
    level = step % L
    if L > 1:
        weights = tl.load(weight_ptrs + level * V * D, mask=(d < D)[None, :])
    rows = tl.arange(0, NORM_ROWS)
    following = _load_rows(x_ptr, tl.minimum(rows, R - 1), d, D, NUM_STREAMS)
    if not GREEDY:
        for first in range(0, B, NOISE_ROWS):
            b = (first + tl.arange(0, NOISE_ROWS))[:, None]
            seeds = tl.load(seeds_ptr + tl.minimum(b, B - 1))
            noise = minus_noise(seeds, step * V + columns[None, :])
            place = noise_ptr + b.to(tl.int64) * V + columns[None, :]
            tl.store(place, noise, mask=(b < B) & in_vocabulary[None, :])
    scale = tl.full([1, 1], 1.0, tl.float32)
    if head_scale_ptr is not None:
        scale = tl.load(head_scale_ptr + level * V + n)[None, :]
    bias = tl.zeros([1, 1], tl.float32)
    if head_bias_ptr is not None:
        bias = tl.load(head_bias_ptr + level * V + n)[None, :]
    weights = tl.where((d < D)[None, :], weights.to(tl.float32), 0.0)

    for first in range(0, R, NORM_ROWS):
        row = first + rows
        x = following
        following = _load_rows(x_ptr, tl.minimum(row + NORM_ROWS, R - 1), d, D, NUM_STREAMS)
        mean = tl.sum(x, 1) * (1.0 / D)
        centred = tl.where((d < D)[None, :], x - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) * (1.0 / D)
        inverse = tl.rsqrt(variance + NORM_EPSILON)
        hidden = centred * inverse[:, None] * norm_weight[None, :] + norm_bias[None, :]
        logits = tl.sum(hidden[:, None, :] * weights[None, :, :], 2) * scale + bias
        place = logits_ptr + row.to(tl.int64)[:, None] * V + columns[None, :]
        tl.store(place, logits, mask=(row < R)[:, None] & in_vocabulary[None, :])

    tl.debug_barrier()  # what all threads have stored comes before the count
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if arrived == tl.num_programs(0) - 1:
        minus_infinity = float("-inf")
        v = tl.arange(0, BLOCK_V)[None, :]
        for first in range(0, B, ROWS):
            b = first + tl.arange(0, ROWS)
            offsets = b.to(tl.int64)[:, None] * V + v
            inside = (b < B)[:, None] & (v < V)
            scores = tl.load(logits_ptr + offsets, mask=inside, other=minus_infinity)
            if EOS:
                early = (v == eos) & (step < eos_from)
                scores = tl.where(early, minus_infinity, scores)
            if GUIDED:
                twins_ptr = logits_ptr + tl.cast(B, tl.int64) * V
                unconditional = tl.load(twins_ptr + offsets, mask=inside, other=0.0)
                scores = guide(scores, unconditional, guidance_scale)
            if allowed_ptr is not None:
                place = allowed_ptr + level * V + v
                allowed = tl.load(place, mask=v < V, other=0)
                scores = tl.where(allowed != 0, scores, minus_infinity)
            if GREEDY:
                token = tl.argmax(scores, 1)
            else:
                noise = tl.load(noise_ptr + offsets, mask=inside, other=0.0)
                token = draw(
                    scores, noise, inverse_temperature, top_k, top_p, largest_deficit,
                    TOP_K, TOP_P, MIN_P,
                )  # fmt: skip
            if finished_ptr is not None:
                finished = tl.load(finished_ptr + b, mask=b < B, other=0)
                token = tl.where(finished != 0, eos, token)
                tl.store(finished_ptr + b, (token == eos).to(tl.uint8), mask=b < B)
            tl.store(tokens_ptr + b, token.to(tl.int64), mask=b < B)

            place = (level * num_embeddings + token)[:, None] * D + d[None, :]
            written = (b < B)[:, None] & (d < D)[None, :]
            embedding = tl.load(embedding_ptr + place, mask=written, other=0.0).to(tl.float32)
            for twin in tl.static_range(2 if GUIDED else 1):
                for stream in tl.static_range(NUM_STREAMS):
                    target = ((twin * B + b).to(tl.int64) * NUM_STREAMS + stream)[:, None] * D
                    tl.store(x_ptr + target + d[None, :], embedding, mask=written)
        tl.store(counter_ptr, 0)


def sample_next_token(
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
    counters: Tensor | None,
) -> Tensor:
    """The op's body on CUDA: see next_token_op.py."""
    B, R, (L, V, D) = len(seeds), len(x), head_weight.shape
    check_float8("head_weight", head_weight)
    if V > MAX_V or D > MAX_D:
        raise ValueError(
            f"head_weight has {V} tokens of width {D}, "
            f"wanted at most {MAX_V} of {MAX_D} on {x.device}"
        )
    tokens = torch.empty(B, dtype=torch.int64, device=x.device)
    if B == 0:
        return tokens
    logits = torch.empty(R, V, dtype=torch.float32, device=x.device)
    noise = torch.empty(B, V, dtype=torch.float32, device=x.device)
    if counters is None:
        counters = torch.zeros(1, dtype=torch.int32, device=x.device)
    filters = Filters.of(V, temperature, top_k, top_p, min_p)
    block_n, block_d, block_v, rows, num_warps = _blocks(B, V, D)
    _sample_next_token[(triton.cdiv(V, block_n),)](
        x, norm_weight, norm_bias, head_weight, embedding, head_scale, head_bias,
        _packed(_bytes(allowed)), step,
        seeds.contiguous(), _bytes(finished), logits, noise, counters, tokens,
        B, R, V, embedding.shape[1], 0 if eos is None else eos, eos_from,
        0.0 if guidance_scale is None else guidance_scale, *filters[:-1],
        **filters.constants, GUIDED=guidance_scale is not None, EOS=eos is not None,
        L=L, D=D, NUM_STREAMS=x.shape[1] if x.dim() == 3 else 1, NORM_EPSILON=NORM_EPSILON,
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_V=block_v, ROWS=rows, NORM_ROWS=NORM_ROWS,
        NOISE_ROWS=NOISE_ROWS,
        num_warps=num_warps, enable_fp_fusion=False, **dependent_launch(x),
    )  # fmt: skip
    return tokens


def _blocks(B: int, V: int, D: int) -> tuple[int, int, int, int, int]:
    """BLOCK_N, BLOCK_D, BLOCK_V, ROWS and the warps. The number of rows decides ROWS alone, of the
    part that is exact: no row has its sums in another order because of the others."""
    block_d, block_v = max(triton.next_power_of_2(D), 128), max(triton.next_power_of_2(V), 128)
    num_warps = 8 if block_d > 1024 or block_v > 4096 else 4
    block_n = max(1, min(8, WEIGHTS_PER_THREAD * 32 * num_warps // block_d))
    most_rows = max(1, min(16, SCORES_PER_THREAD * 32 * num_warps // block_v))
    rows = min(most_rows, triton.next_power_of_2(B))
    return block_n, block_d, block_v, rows, num_warps


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _bytes(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(torch.uint8)
