"""The gradients of the embedding of patches in Triton. What the forward pass held in registers is
computed again: nothing but the choice is saved.

    x = normalised patches [M, P * P]      y = x @ folded_weight.T      z = y + folded_bias, normalised
    grad_z = grad_tokens * norm_weight     grad_y = (grad_z - mean(grad_z) - z mean(grad_z z)) / std(y)
    G = grad_y.T @ x

The two products are PyTorch's, what lies between them is a pass over the rows. All else follows from
G, so that no gradient of the normalised patches is needed for the parameters:

    grad_weight = G * patch_norm_weight + grad_bias patch_norm_bias.T        grad_bias = sum(grad_y)
    grad_patch_norm_weight = sum over D of G * weight
    grad_patch_norm_bias = grad_bias @ weight

Sums over rows run within a program, then over what the programs leave, both in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.patch_dropout.launch import Problem
from musiclm_kernels.patch_dropout.patch_rows import (
    ROW_ELEMENTS,
    ROW_WARPS,
    load_patches,
    normalised,
    normalised_patches,
    patch_offsets,
    patch_places,
)
from musiclm_kernels.patch_dropout.prepare import fold
from musiclm_kernels.patch_dropout.reference import EPSILON

NORM_WARPS = 4
NORM_ELEMENTS = 1024  # with more, Triton 3.7.1 spills on sm_100
# Programs of the pass over the rows take more tiles each rather than be more than this many, so that
# what they leave is quickly added up.
MAX_PARTIALS = 1024
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 128, 16, 4
UNFOLD_ROWS, UNFOLD_WARPS = 128, 4


@triton.jit(do_not_specialize=["M", "num_tiles"])
def _norm_backward_kernel(
    grad_ptr,  # [M, D]
    products_ptr,  # [M, D]: y; becomes grad_y
    mask_ptr,  # [M]
    bias_ptr,  # [padded D], folded
    norm_weight_ptr,  # [D]
    partials_ptr,  # [programs, 3, D]: of norm_weight, of norm_bias, of bias
    M,
    num_tiles,  # of a program
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    real = columns < D
    bias = tl.load(bias_ptr + columns, mask=real, other=0.0)[None, :]
    norm_weight = tl.load(norm_weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
    grad_norm_weight = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    grad_norm_bias = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    first = tl.program_id(0) * num_tiles * BLOCK_M
    for tile in range(num_tiles):
        rows = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        kept = tl.load(mask_ptr + rows, mask=rows < M, other=0) != 0
        offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
        within = (rows < M)[:, None] & real[None, :]
        grad_mask = kept[:, None] & real[None, :]
        grad = tl.load(grad_ptr + offsets, mask=grad_mask, other=0.0).to(tl.float32)
        y = tl.load(products_ptr + offsets, mask=within, other=0.0).to(tl.float32) + bias

        z = tl.where(real[None, :], y - (tl.sum(y, axis=1) / D)[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(z * z, axis=1) / D + EPSILON)
        z *= inverse[:, None]
        grad_norm_weight += grad * z
        grad_norm_bias += grad
        grad *= norm_weight[None, :]
        mean, along = tl.sum(grad, axis=1) / D, tl.sum(grad * z, axis=1) / D
        grad = (grad - mean[:, None] - z * along[:, None]) * inverse[:, None]
        grad = tl.where(real[None, :], grad, 0.0)
        grad_bias += grad
        tl.store(products_ptr + offsets, grad.to(products_ptr.dtype.element_ty), mask=within)
    partials = partials_ptr + tl.program_id(0).to(tl.int64) * (3 * D) + columns
    tl.store(partials, tl.sum(grad_norm_weight, axis=0), mask=real)
    tl.store(partials + D, tl.sum(grad_norm_bias, axis=0), mask=real)
    tl.store(partials + 2 * D, tl.sum(grad_bias, axis=0), mask=real)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_kernel(
    partials_ptr,  # [num_partials, 3, D]
    sums_ptr,  # [3, D]
    num_partials,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < 3 * D
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_partials, ROWS):
        rows = start + tl.arange(0, ROWS)
        offsets = rows.to(tl.int64)[:, None] * (3 * D) + columns[None, :]
        mask = (rows < num_partials)[:, None] & real[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    tl.store(sums_ptr + columns, tl.sum(total, axis=0), mask=real)


@triton.jit
def _unfold_kernel(
    grad_folded_ptr,  # [D, P2 * P2]: G
    sums_ptr,  # [3, D]
    weight_ptr,  # [D, P * P]
    patch_norm_weight_ptr,  # [P * P]
    patch_norm_bias_ptr,  # [P * P]
    grad_weight_ptr,  # [D, P * P]
    grad_patch_norm_weight_ptr,  # [P * P]
    grad_patch_norm_bias_ptr,  # [P * P]
    D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program covers the bins of one frame of the patch, for all D."""
    frame = tl.program_id(0)
    bins = tl.arange(0, P2)
    real = bins < P
    value = bins * P + frame
    norm_weight = tl.load(patch_norm_weight_ptr + value, mask=real, other=0.0).to(tl.float32)
    norm_bias = tl.load(patch_norm_bias_ptr + value, mask=real, other=0.0).to(tl.float32)
    grad_norm_weight = tl.zeros((BLOCK_D, P2), dtype=tl.float32)
    grad_norm_bias = tl.zeros((BLOCK_D, P2), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        rows = start + tl.arange(0, BLOCK_D)
        mask = (rows < D)[:, None] & real[None, :]
        folded = grad_folded_ptr + rows[:, None] * (P2 * P2) + frame * P2 + bins[None, :]
        folded = tl.load(folded, mask=mask, other=0.0).to(tl.float32)
        offsets = rows[:, None] * (P * P) + value[None, :]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(sums_ptr + 2 * D + rows, mask=rows < D, other=0.0)[:, None]
        grad = folded * norm_weight[None, :] + bias * norm_bias[None, :]
        tl.store(grad_weight_ptr + offsets, grad.to(grad_weight_ptr.dtype.element_ty), mask=mask)
        grad_norm_weight += folded * weight
        grad_norm_bias += bias * weight
    dtype = grad_patch_norm_weight_ptr.dtype.element_ty
    total = tl.sum(grad_norm_weight, axis=0)
    tl.store(grad_patch_norm_weight_ptr + value, total.to(dtype), mask=real)
    dtype = grad_patch_norm_bias_ptr.dtype.element_ty
    total = tl.sum(grad_norm_bias, axis=0)
    tl.store(grad_patch_norm_bias_ptr + value, total.to(dtype), mask=real)


@triton.jit(do_not_specialize=["num_patches", "N", "keep", "H"])
def _spectrogram_kernel(
    spectrogram_ptr,  # [B, W * P, H * P], strided
    grad_rows_ptr,  # [B * keep, P2 * P2], of the normalised patches
    slots_ptr,  # [B, N]
    grad_ptr,  # [B, W * P, H * P]
    num_patches,  # B * N
    N,
    keep,
    H,
    stride_b,
    stride_t,
    stride_grad_b,
    stride_grad_t,
    EPSILON: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    patches = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = patches < num_patches
    b, patch = patches // N, patches % N
    slot = tl.load(slots_ptr + patches, mask=there, other=-1)
    kept = slot >= 0
    x = load_patches(spectrogram_ptr, b, patch, kept, H, stride_b, stride_t, P, P2)
    x, inverse = normalised(x, EPSILON, P, P2)
    rows = b.to(tl.int64) * keep + slot
    places = tl.arange(0, P2 * P2)
    offsets = rows[:, None] * (P2 * P2) + places[None, :]
    grad = tl.load(grad_rows_ptr + offsets, mask=kept[:, None], other=0.0).to(tl.float32)
    # Past the patch the weight is zero, and so is grad.
    mean = tl.sum(grad, axis=1) / (P * P)
    along = tl.sum(grad * x, axis=1) / (P * P)
    grad = (grad - mean[:, None] - x * along[:, None]) * inverse[:, None]
    _, _, real = patch_places(P, P2)
    offsets = patch_offsets(b, patch, H, stride_grad_b, stride_grad_t, P, P2)
    mask = there[:, None] & real[None, :]
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def tokens_backward(
    grad_tokens: Tensor,
    spectrogram: Tensor,
    indices: Tensor,
    key_mask: Tensor,
    slots: Tensor,
    patch_size: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The backward op's body on CUDA: see op.py."""
    *parameters, wants_spectrogram = rest
    _, keep, D = grad_tokens.shape
    problem = Problem.of(spectrogram, keep, patch_size, tuple(parameters), grad_tokens.dtype)
    folded_weight, folded_bias = fold(problem)
    folded_weight = folded_weight[:D]
    rows = normalised_patches(problem, indices, key_mask)
    grad_spectrogram = problem.empty(0, dtype=spectrogram.dtype)
    grad_products, sums = _norm_backward(
        problem, grad_tokens.contiguous(), rows @ folded_weight.T, key_mask, folded_bias
    )
    grad_folded = grad_products.T @ rows
    if wants_spectrogram:
        grad_spectrogram = _grad_spectrogram(problem, grad_products @ folded_weight, slots)
    first = _unfold(problem, grad_folded, sums)
    gradients = (*first, sums[2], sums[0], sums[1])
    return grad_spectrogram, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))


def _norm_backward(
    problem: Problem, grad: Tensor, products: Tensor, key_mask: Tensor, folded_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of the products, in their place, and [3, D] sums: the gradients of the norm's
    weight, of its bias and of the projection's bias."""
    M, D = problem.M, problem.D
    width = triton.next_power_of_2(D)
    block = max(NORM_ELEMENTS // width, 1)
    tiles = triton.cdiv(triton.cdiv(M, block), MAX_PARTIALS)  # of a program
    num_programs = triton.cdiv(M, block * tiles) if M else 0
    partials, sums = problem.empty(num_programs, 3, D), problem.empty(3, D)
    if num_programs:
        _norm_backward_kernel[(num_programs,)](
            grad, products, key_mask, folded_bias, problem.norm_weight, partials, M, tiles,
            EPSILON=EPSILON, D=D, BLOCK_M=block, BLOCK_D=width, num_warps=NORM_WARPS,
        )  # fmt: skip
    _sum_kernel[(triton.cdiv(3 * D, SUM_COLUMNS),)](
        partials, sums, num_programs, D=D, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=SUM_WARPS
    )
    return products, sums


def _unfold(problem: Problem, grad_folded: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the patch norm's weight and bias, and of the projection's weight."""
    grads = (
        torch.empty_like(problem.patch_norm_weight),
        torch.empty_like(problem.patch_norm_bias),
        torch.empty_like(problem.weight),
    )
    _unfold_kernel[(problem.P,)](
        grad_folded, sums, problem.weight, problem.patch_norm_weight, problem.patch_norm_bias,
        grads[2], grads[0], grads[1],
        D=problem.D, P=problem.P, P2=problem.P2, BLOCK_D=UNFOLD_ROWS, num_warps=UNFOLD_WARPS,
    )  # fmt: skip
    return grads


def _grad_spectrogram(problem: Problem, grad_rows: Tensor, slots: Tensor) -> Tensor:
    spectrogram = problem.spectrogram
    grad = torch.empty(spectrogram.shape, dtype=spectrogram.dtype, device=spectrogram.device)
    N = problem.W * problem.H
    block = max(ROW_ELEMENTS // problem.P2**2, 1)
    if problem.B:
        _spectrogram_kernel[(triton.cdiv(problem.B * N, block),)](
            spectrogram, grad_rows, slots, grad, problem.B * N, N, problem.keep, problem.H,
            *spectrogram.stride()[:2], *grad.stride()[:2],
            EPSILON=EPSILON, P=problem.P, P2=problem.P2, BLOCK_N=block, num_warps=ROW_WARPS,
        )  # fmt: skip
    return grad
