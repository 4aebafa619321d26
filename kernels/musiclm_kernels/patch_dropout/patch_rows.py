"""Patches of a spectrogram as normalised rows: what the forward and the backward pass begin with.

A row has P2 * P2 places, P2 the power of two from P on, in the order of the spectrogram's memory: P
bins of the patch's first frame, of its second, and so on. So neighbouring lanes read neighbouring
bins. The weight is folded into this order; places past P are zero.
"""

import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.patch_dropout.launch import Problem
from musiclm_kernels.patch_dropout.reference import EPSILON

ROW_ELEMENTS = 4096  # of a program's tile of rows where nothing is multiplied
ROW_WARPS = 4


@triton.jit
def patch_places(P: tl.constexpr, P2: tl.constexpr):
    """Of each place of a row: frame and bin within the patch, and whether it is one of the patch."""
    places = tl.arange(0, P2 * P2)
    frame, bin = places // P2, places % P2
    return frame, bin, (frame < P) & (bin < P)


@triton.jit
def patch_offsets(b, patch, H, stride_b, stride_t, P: tl.constexpr, P2: tl.constexpr):
    """[rows, P2 * P2]: where the values of patch[i] in batch row b[i] lie."""
    frame, bin, _ = patch_places(P, P2)
    first_frame, first_bin = patch // H * P, patch % H * P
    first = b.to(tl.int64) * stride_b + first_frame.to(tl.int64) * stride_t + first_bin
    return first[:, None] + (frame.to(tl.int64) * stride_t + bin)[None, :]


@triton.jit
def load_patches(
    spectrogram_ptr,  # [B, W * P, H * P], strided
    b,
    patch,
    there,
    H,
    stride_b,
    stride_t,
    P: tl.constexpr,
    P2: tl.constexpr,
):
    """[rows, P2 * P2] in fp32; zeros past the patch and where there is none."""
    offsets = patch_offsets(b, patch, H, stride_b, stride_t, P, P2)
    mask = there[:, None]
    if P2 != P:
        _, _, real = patch_places(P, P2)
        mask = mask & real[None, :]
    return tl.load(spectrogram_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalised(x, EPSILON: tl.constexpr, P: tl.constexpr, P2: tl.constexpr):
    """Rows of mean 0 and variance 1, zero past the patch; and one over their standard deviation."""
    x -= (tl.sum(x, axis=1) / (P * P))[:, None]
    if P2 != P:
        _, _, real = patch_places(P, P2)
        x = tl.where(real[None, :], x, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / (P * P) + EPSILON)
    return x * inverse[:, None], inverse


@triton.jit(do_not_specialize=["M", "keep", "H"])
def _rows_kernel(
    spectrogram_ptr,  # [B, W * P, H * P], strided
    indices_ptr,  # [M]
    mask_ptr,  # [M]
    out_ptr,  # [M, P2 * P2]
    M,
    keep,
    H,
    stride_b,
    stride_t,
    EPSILON: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < M
    patch = tl.load(indices_ptr + rows, mask=there, other=0).to(tl.int32)
    kept = tl.load(mask_ptr + rows, mask=there, other=0) != 0
    x = load_patches(spectrogram_ptr, rows // keep, patch, kept, H, stride_b, stride_t, P, P2)
    x, _ = normalised(x, EPSILON, P, P2)
    offsets = rows.to(tl.int64)[:, None] * (P2 * P2) + tl.arange(0, P2 * P2)[None, :]
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=there[:, None])


def normalised_patches(problem: Problem, indices: Tensor, key_mask: Tensor) -> Tensor:
    """[M, P2 * P2] in the problem's dtype, zeros where key_mask is False."""
    width = problem.P2**2
    out = problem.empty(problem.M, width, dtype=problem.dtype)
    block = max(ROW_ELEMENTS // width, 1)
    spectrogram = problem.spectrogram
    _rows_kernel[(triton.cdiv(problem.M, block),)](
        spectrogram, indices, key_mask, out, problem.M, problem.keep, problem.H,
        *spectrogram.stride()[:2],
        EPSILON=EPSILON, P=problem.P, P2=problem.P2, BLOCK_M=block, num_warps=ROW_WARPS,
    )  # fmt: skip
    return out
