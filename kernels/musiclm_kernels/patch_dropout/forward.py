"""From a spectrogram to tokens in Triton, in two launches: `prepare`, and one in which a program owns
BLOCK_M of the tokens that stay. It reads their patches once, normalises them in registers, and
multiplies them with the folded weight, BLOCK_D columns at a time, while it adds up the second norm's
statistics. The columns wait in the output, which the second-level cache still holds when the norm and
the position are applied.

Where the product has to be exact (float32), or patches are too wide for a program's registers, it is
PyTorch's, between a launch that writes normalised patches and one that applies the norm.

Dimensions: B batch, P side of a patch, D width, M = B * keep tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.patch_dropout.launch import COLUMNS, Problem
from musiclm_kernels.patch_dropout.patch_rows import (
    ROW_ELEMENTS,
    ROW_WARPS,
    load_patches,
    normalised,
    normalised_patches,
)
from musiclm_kernels.patch_dropout.prepare import prepare
from musiclm_kernels.patch_dropout.reference import EPSILON

MAX_FUSED_WIDTH = 256  # places of a patch: 16 by 16
# Tokens of a program. Twice as many would read the weight half as often, and spill.
BLOCK_M = 64
BLOCK_D = 64  # columns of a product
FUSED_WARPS = 8


@triton.jit
def _position(positions_ptr, patch, W, H, columns, PADDED_D: tl.constexpr):
    """[rows, columns]: the table's row of each patch's column and that of its row, together. All
    columns below PADDED_D."""
    of_column = positions_ptr + (patch // H)[:, None] * PADDED_D + columns[None, :]
    of_row = positions_ptr + (W + patch % H)[:, None] * PADDED_D + columns[None, :]
    within = (columns < PADDED_D)[None, :]
    of_column = tl.load(of_column, mask=within, other=0.0)
    return of_column + tl.load(of_row, mask=within, other=0.0)


@triton.jit(do_not_specialize=["M", "keep", "W", "H"])
def _embed_kernel(
    spectrogram_ptr,  # [B, W * P, H * P], strided
    indices_ptr,  # [M]
    mask_ptr,  # [M]
    weight_ptr,  # [PADDED_D, P2 * P2], folded
    bias_ptr,  # [PADDED_D], folded
    norm_weight_ptr,  # [D]
    norm_bias_ptr,  # [D]
    positions_ptr,  # [W + H, PADDED_D]
    out_ptr,  # [M, D]
    M,
    keep,
    W,
    H,
    stride_b,
    stride_t,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < M
    patch = tl.load(indices_ptr + rows, mask=there, other=0).to(tl.int32)
    kept = tl.load(mask_ptr + rows, mask=there, other=0) != 0
    out = out_ptr + rows.to(tl.int64)[:, None] * D
    x = load_patches(spectrogram_ptr, rows // keep, patch, kept, H, stride_b, stride_t, P, P2)
    x, _ = normalised(x, EPSILON, P, P2)
    x = x.to(weight_ptr.dtype.element_ty)

    places = tl.arange(0, P2 * P2)
    mean = tl.zeros((BLOCK_M,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)  # of the distances to the mean
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        weight = tl.load(weight_ptr + columns[:, None] * (P2 * P2) + places[None, :])
        y = tl.dot(x, tl.trans(weight)) + tl.load(bias_ptr + columns)[None, :]
        within = there[:, None] & (columns < D)[None, :]
        tl.store(out + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=within)

        # Means and squares of two sets of columns put together: no difference of large sums.
        first = tl.cast(start, tl.float32)
        count = tl.minimum(D - first, BLOCK_D)
        block_mean = tl.sum(y, axis=1) / count
        y -= block_mean[:, None]
        if D % BLOCK_D:
            y = tl.where((columns < D)[None, :], y, 0.0)
        distance = block_mean - mean
        share = count / (first + count)
        squares += tl.sum(y * y, axis=1) + distance * distance * (first * share)
        mean += distance * share
    inverse = tl.rsqrt(squares / D + EPSILON)

    tl.debug_barrier()  # other threads read what this one stored
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        within = there[:, None] & (columns < D)[None, :]
        y = tl.load(out + columns[None, :], mask=within, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < D, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + columns, mask=columns < D, other=0.0)
        y = (y - mean[:, None]) * inverse[:, None]
        y = y * norm_weight.to(tl.float32)[None, :] + norm_bias.to(tl.float32)[None, :]
        y += _position(positions_ptr, patch, W, H, columns, PADDED_D)
        y = tl.where(kept[:, None], y, 0.0)
        tl.store(out + columns[None, :], y.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["M", "W", "H"])
def _norm_kernel(
    products_ptr,  # [M, D]
    indices_ptr,  # [M]
    mask_ptr,  # [M]
    bias_ptr,  # [PADDED_D], folded
    norm_weight_ptr,  # [D]
    norm_bias_ptr,  # [D]
    positions_ptr,  # [W + H, PADDED_D]
    out_ptr,  # [M, D]
    M,
    W,
    H,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < M
    patch = tl.load(indices_ptr + rows, mask=there, other=0).to(tl.int32)
    kept = tl.load(mask_ptr + rows, mask=there, other=0) != 0
    columns = tl.arange(0, BLOCK_D)
    real = columns < D
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    within = there[:, None] & real[None, :]

    y = tl.load(products_ptr + offsets, mask=within, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + columns, mask=real, other=0.0)[None, :]
    y = tl.where(real[None, :], y - (tl.sum(y, axis=1) / D)[:, None], 0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=1) / D + EPSILON)[:, None]
    norm_weight = tl.load(norm_weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + columns, mask=real, other=0.0).to(tl.float32)
    y = y * norm_weight[None, :] + norm_bias[None, :]
    y += _position(positions_ptr, patch, W, H, columns, PADDED_D)
    y = tl.where(kept[:, None], y, 0.0)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=within)


def tokens_and_places(
    spectrogram: Tensor,
    num_valid: Tensor | None,
    seed: Tensor | None,
    keep: int,
    patch_size: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op's body on CUDA: see op.py."""
    *parameters, dtype = rest
    problem = Problem.of(spectrogram, keep, patch_size, tuple(parameters), dtype)
    (indices, codes, key_mask, slots), folded, positions = prepare(problem, num_valid, seed)
    if not problem.M:
        tokens = problem.empty(problem.B, keep, problem.D, dtype=dtype)
    elif dtype == torch.float32 or problem.P2**2 > MAX_FUSED_WIDTH:
        tokens = _in_three_steps(problem, indices, key_mask, *folded, positions)
    else:
        tokens = _in_one_step(problem, indices, key_mask, *folded, positions)
    return tokens, indices, codes, key_mask, slots


def _in_one_step(
    problem: Problem,
    indices: Tensor,
    key_mask: Tensor,
    folded_weight: Tensor,
    folded_bias: Tensor,
    positions: Tensor,
) -> Tensor:
    M, spectrogram = problem.M, problem.spectrogram
    out = problem.empty(problem.B, problem.keep, problem.D, dtype=problem.dtype)
    _embed_kernel[(triton.cdiv(M, BLOCK_M),)](
        spectrogram, indices, key_mask, folded_weight, folded_bias,
        problem.norm_weight, problem.norm_bias, positions, out,
        M, problem.keep, problem.W, problem.H, *spectrogram.stride()[:2],
        EPSILON=EPSILON, D=problem.D, PADDED_D=problem.padded_D, P=problem.P, P2=problem.P2,
        BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, COLUMNS=COLUMNS, num_warps=FUSED_WARPS, num_stages=2,
    )  # fmt: skip
    return out


def _in_three_steps(
    problem: Problem,
    indices: Tensor,
    key_mask: Tensor,
    folded_weight: Tensor,
    folded_bias: Tensor,
    positions: Tensor,
) -> Tensor:
    M, D = problem.M, problem.D
    products = normalised_patches(problem, indices, key_mask) @ folded_weight[:D].T
    out = problem.empty(problem.B, problem.keep, D, dtype=problem.dtype)
    width = triton.next_power_of_2(D)
    block = max(ROW_ELEMENTS // width, 1)
    _norm_kernel[(triton.cdiv(M, block),)](
        products, indices, key_mask, folded_bias, problem.norm_weight, problem.norm_bias,
        positions, out, M, problem.W, problem.H,
        EPSILON=EPSILON, D=D, PADDED_D=problem.padded_D, BLOCK_M=block, BLOCK_D=width,
        num_warps=ROW_WARPS,
    )  # fmt: skip
    return out
