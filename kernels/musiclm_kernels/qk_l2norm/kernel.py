"""Unit queries and keys in Triton. A program covers BLOCK_N rows of one head, of q or of k: they
stay in registers whole between one load and one store, and both tensors share a grid.

Dimensions: B batch, H query heads, Hkv key heads, N queries, M keys, D width. A function that does
for k what it does for q says H and N for both.

Memory-bound. With R = B * (H * N + Hkv * M) rows of e bytes an element, the floor is
    forward    2 R D e      each element read, written
    backward   3 R D e      x and its gradient out read, its gradient written
and for the scales' gradients 8 D bytes a backward program, its partial sums written and read: 2 % of
the rest in bf16 at D 64 where a program takes one tile, less where it takes more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.layout import empty_rows_like
from musiclm_kernels.qk_l2norm.reference import EPSILON

# One program's tile of q or k. A forward thread holds 32 of its elements: four loads of 16 bytes in
# flight in bf16. A backward thread holds 16 of each of three tiles: with 32, ptxas 12.8 spilled at D 128.
TILE_ELEMENTS = 4096
FORWARD_ELEMENTS_PER_WARP = 1024
BACKWARD_ELEMENTS_PER_WARP = 512
# Backward programs take more tiles each rather than be more than this many, so that what they leave
# is quickly added up. Several waves on any GPU.
MAX_PARTIALS = 4096
# One program of that sum: 64 bytes of each row, 16 bytes a thread.
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 128, 16, 4


@triton.jit
def _load_rows(ptr, b, h, rows, columns, mask, stride_b, stride_h, stride_n):
    offsets = b * stride_b + h * stride_h + rows[:, None] * stride_n + columns[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _inverse_lengths(x, EPSILON: tl.constexpr):
    """[BLOCK_N] each: one over the clamped length, and whether the length is below the clamp."""
    square = tl.sum(x * x, axis=1)
    # where, not maximum: a NaN stays one
    clamped = square < EPSILON * EPSILON
    return tl.rsqrt(tl.where(clamped, EPSILON * EPSILON, square)), clamped


@triton.jit
def _forward_block(
    x_ptr,  # [B, H, N, D], strided
    scale_ptr,  # [D] or [H, D]
    out_ptr,  # [B, H, N, D], strided
    program,
    H,
    N,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_yb,  # of out
    stride_yh,
    stride_yn,
    stride_scale_h,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_N)
    head = program // num_blocks  # b * H + h
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    rows = (program % num_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (columns < D)[None, :]

    x = _load_rows(x_ptr, b, h, rows, columns, mask, stride_xb, stride_xh, stride_xn)
    scale = tl.load(scale_ptr + h * stride_scale_h + columns, mask=columns < D, other=0.0)

    inverse, _ = _inverse_lengths(x, EPSILON)
    out = x * inverse[:, None] * scale.to(tl.float32)[None, :]

    offsets = b * stride_yb + h * stride_yh + rows[:, None] * stride_yn + columns[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, H, N, D], strided
    k_ptr,  # [B, Hkv, M, D], strided
    q_scale_ptr,  # [D] or [H, D]
    k_scale_ptr,  # [D] or [Hkv, D]
    q_out_ptr,  # [B, H, N, D], strided
    k_out_ptr,  # [B, Hkv, M, D], strided
    num_q_programs,
    H,
    Hkv,
    N,
    M,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_km,
    stride_yqb,
    stride_yqh,
    stride_yqn,
    stride_ykb,
    stride_ykh,
    stride_ykm,
    stride_q_scale_h,
    stride_k_scale_h,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_q_programs:
        _forward_block(
            q_ptr, q_scale_ptr, q_out_ptr, program, H, N,
            stride_qb, stride_qh, stride_qn, stride_yqb, stride_yqh, stride_yqn, stride_q_scale_h,
            EPSILON, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _forward_block(
            k_ptr, k_scale_ptr, k_out_ptr, program - num_q_programs, Hkv, M,
            stride_kb, stride_kh, stride_km, stride_ykb, stride_ykh, stride_ykm, stride_k_scale_h,
            EPSILON, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _backward_blocks(
    grad_out_ptr,  # [B, H, N, D], strided
    x_ptr,  # [B, H, N, D], strided
    scale_ptr,  # [D] or [H, D]
    grad_x_ptr,  # [B, H, N, D], strided
    partial_ptr,  # [D], this program's
    program,
    H,
    N,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_yb,  # of grad_x
    stride_yh,
    stride_yn,
    stride_scale_h,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    programs_per_head = tl.cdiv(N, BLOCK_N * NUM_BLOCKS)
    head = program // programs_per_head  # b * H + h
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first = (program % programs_per_head).to(tl.int64) * (BLOCK_N * NUM_BLOCKS)
    columns = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr + h * stride_scale_h + columns, mask=columns < D, other=0.0)
    scale = scale.to(tl.float32)

    grad_scale = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for block in range(NUM_BLOCKS):
        rows = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        x = _load_rows(x_ptr, b, h, rows, columns, mask, stride_xb, stride_xh, stride_xn)
        grad = _load_rows(grad_out_ptr, b, h, rows, columns, mask, stride_gb, stride_gh, stride_gn)

        inverse, clamped = _inverse_lengths(x, EPSILON)
        unit = x * inverse[:, None]
        grad_scale += grad * unit
        grad_unit = grad * scale[None, :]
        # Where the clamp holds, the length does not follow x.
        along = tl.where(clamped, 0.0, tl.sum(grad_unit * unit, axis=1))
        grad_x = (grad_unit - along[:, None] * unit) * inverse[:, None]

        offsets = b * stride_yb + h * stride_yh + rows[:, None] * stride_yn + columns[None, :]
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + columns, tl.sum(grad_scale, axis=0), mask=columns < D)


@triton.jit
def _backward_kernel(
    grad_q_out_ptr,  # [B, H, N, D], strided
    grad_k_out_ptr,  # [B, Hkv, M, D], strided
    q_ptr,  # [B, H, N, D], strided
    k_ptr,  # [B, Hkv, M, D], strided
    q_scale_ptr,  # [D] or [H, D]
    k_scale_ptr,  # [D] or [Hkv, D]
    grad_q_ptr,  # [B, H, N, D], strided
    grad_k_ptr,  # [B, Hkv, M, D], strided
    partials_ptr,  # [programs, D]
    num_q_programs,
    H,
    Hkv,
    N,
    M,
    stride_gqb,
    stride_gqh,
    stride_gqn,
    stride_gkb,
    stride_gkh,
    stride_gkm,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_km,
    stride_yqb,
    stride_yqh,
    stride_yqn,
    stride_ykb,
    stride_ykh,
    stride_ykm,
    stride_q_scale_h,
    stride_k_scale_h,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    program = tl.program_id(0)
    partial_ptr = partials_ptr + program.to(tl.int64) * D
    if program < num_q_programs:
        _backward_blocks(
            grad_q_out_ptr, q_ptr, q_scale_ptr, grad_q_ptr, partial_ptr, program, H, N,
            stride_gqb, stride_gqh, stride_gqn, stride_qb, stride_qh, stride_qn,
            stride_yqb, stride_yqh, stride_yqn, stride_q_scale_h,
            EPSILON, D, BLOCK_N, BLOCK_D, NUM_BLOCKS,
        )  # fmt: skip
    else:
        _backward_blocks(
            grad_k_out_ptr, k_ptr, k_scale_ptr, grad_k_ptr, partial_ptr,
            program - num_q_programs, Hkv, M,
            stride_gkb, stride_gkh, stride_gkm, stride_kb, stride_kh, stride_km,
            stride_ykb, stride_ykh, stride_ykm, stride_k_scale_h,
            EPSILON, D, BLOCK_N, BLOCK_D, NUM_BLOCKS,
        )  # fmt: skip


@triton.jit
def _sum_block(
    partials_ptr,  # [B, H, programs_per_head, D]
    grad_scale_ptr,  # [D] or [H, D]
    program,
    num_scales,  # 1 or H
    num_rows,  # of each b that share a scale: H * programs_per_head, or programs_per_head
    B,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    scale = (program // column_blocks).to(tl.int64)
    columns = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, B * num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        b, row = (rows // num_rows).to(tl.int64), rows % num_rows
        offsets = ((b * num_scales + scale) * num_rows + row)[:, None] * D + columns[None, :]
        mask = (rows < B * num_rows)[:, None] & (columns < D)[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    grad_scale = tl.sum(total, axis=0).to(grad_scale_ptr.dtype.element_ty)
    tl.store(grad_scale_ptr + scale * D + columns, grad_scale, mask=columns < D)


@triton.jit
def _sum_partials_kernel(
    partials_ptr,  # [B, H, q's programs per head, D], then [B, Hkv, k's programs per head, D]
    grad_q_scale_ptr,  # [D] or [H, D]
    grad_k_scale_ptr,  # [D] or [Hkv, D]
    num_q_programs,  # of the backward kernel
    num_q_sums,  # programs of this one that add q's
    num_q_scales,
    num_k_scales,
    num_q_rows,
    num_k_rows,
    B,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_q_sums:
        _sum_block(
            partials_ptr, grad_q_scale_ptr, program, num_q_scales, num_q_rows, B, D, ROWS, COLUMNS
        )
    else:
        k_partials_ptr = partials_ptr + tl.cast(num_q_programs, tl.int64) * D
        _sum_block(
            k_partials_ptr, grad_k_scale_ptr, program - num_q_sums, num_k_scales, num_k_rows,
            B, D, ROWS, COLUMNS,
        )  # fmt: skip


def qk_l2norm(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The op's body on CUDA: see op.py."""
    q_out, k_out = empty_rows_like(q), empty_rows_like(k)
    q, k, q_scale, k_scale = _with_rows_packed(q, k, q_scale, k_scale)
    (B, H, N, D), (_, Hkv, M, _) = q.shape, k.shape

    BLOCK_N, BLOCK_D, num_warps = _tile(max(N, M), D, FORWARD_ELEMENTS_PER_WARP)
    num_q_programs = B * H * triton.cdiv(N, BLOCK_N)
    num_programs = num_q_programs + B * Hkv * triton.cdiv(M, BLOCK_N)
    if num_programs:
        _forward_kernel[(num_programs,)](
            q, k, q_scale, k_scale, q_out, k_out,
            num_q_programs, H, Hkv, N, M,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            *_head_strides(q_scale, k_scale),
            EPSILON=EPSILON, D=D, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=num_warps,
        )  # fmt: skip
    return q_out, k_out


def qk_l2norm_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward op's body on CUDA: two launches, the rows and then the sums they leave."""
    grad_q, grad_k = empty_rows_like(q), empty_rows_like(k)
    grad_q_out, grad_k_out, q, k, q_scale, k_scale = _with_rows_packed(
        grad_q_out, grad_k_out, q, k, q_scale, k_scale
    )
    grad_q_scale, grad_k_scale = torch.empty_like(q_scale), torch.empty_like(k_scale)
    (B, H, N, D), (_, Hkv, M, _) = q.shape, k.shape

    BLOCK_N, BLOCK_D, num_warps = _tile(max(N, M), D, BACKWARD_ELEMENTS_PER_WARP)
    num_tiles = B * (H * triton.cdiv(N, BLOCK_N) + Hkv * triton.cdiv(M, BLOCK_N))
    NUM_BLOCKS = min(
        triton.next_power_of_2(max(1, triton.cdiv(num_tiles, MAX_PARTIALS))),
        triton.next_power_of_2(max(1, triton.cdiv(max(N, M), BLOCK_N))),
    )
    q_programs_per_head = triton.cdiv(N, BLOCK_N * NUM_BLOCKS)
    k_programs_per_head = triton.cdiv(M, BLOCK_N * NUM_BLOCKS)
    num_q_programs = B * H * q_programs_per_head
    num_programs = num_q_programs + B * Hkv * k_programs_per_head
    partials = q.new_empty((num_programs, D), dtype=torch.float32)

    column_blocks = triton.cdiv(D, SUM_COLUMNS)
    num_q_scales, num_k_scales = q_scale.numel() // D, k_scale.numel() // D
    num_sums = (num_q_scales + num_k_scales) * column_blocks
    if num_programs:
        _backward_kernel[(num_programs,)](
            grad_q_out, grad_k_out, q, k, q_scale, k_scale, grad_q, grad_k, partials,
            num_q_programs, H, Hkv, N, M,
            *grad_q_out.stride()[:3], *grad_k_out.stride()[:3],
            *q.stride()[:3], *k.stride()[:3], *grad_q.stride()[:3], *grad_k.stride()[:3],
            *_head_strides(q_scale, k_scale),
            EPSILON=EPSILON, D=D, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, NUM_BLOCKS=NUM_BLOCKS,
            num_warps=num_warps,
        )  # fmt: skip
    if num_sums:
        _sum_partials_kernel[(num_sums,)](
            partials, grad_q_scale, grad_k_scale,
            num_q_programs, num_q_scales * column_blocks, num_q_scales, num_k_scales,
            # An op without heads has no sum that divides by these.
            H * q_programs_per_head // max(num_q_scales, 1),
            Hkv * k_programs_per_head // max(num_k_scales, 1),
            B, D=D, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=SUM_WARPS,
        )  # fmt: skip
    return grad_q, grad_k, grad_q_scale, grad_k_scale


def _with_rows_packed(*tensors: Tensor) -> list[Tensor]:
    """Each tensor with its last stride 1: copied where it is not, such as the expanded gradient of
    a sum."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _head_strides(q_scale: Tensor, k_scale: Tensor) -> tuple[int, int]:
    """From one head's scale to the next: 0 where the heads share one."""
    q_stride, k_stride = (s.stride(0) if s.dim() == 2 else 0 for s in (q_scale, k_scale))
    return q_stride, k_stride


def _tile(num_rows: int, D: int, elements_per_warp: int) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_D and the warps: TILE_ELEMENTS, or fewer for heads of fewer rows."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_N = min(TILE_ELEMENTS // BLOCK_D, triton.next_power_of_2(max(num_rows, 1)))
    return BLOCK_N, BLOCK_D, max(BLOCK_N * BLOCK_D // elements_per_warp, 1)
