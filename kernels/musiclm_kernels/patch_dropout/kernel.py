"""Patch dropout in Triton: a program a row chooses, then programs of whole tiles copy.

Dimensions: B batch, N patches, D width, M patches taken.

Memory-bound: 2 B keep D elements forward, (keep + N) B D backward. Neither pass adds anything up:
forward reads where `indices` say, backward where `slots`, their inverse, say.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.patch_dropout.choice import MAX_RANKED, block_and_warps, choose_row
from musiclm_kernels.patch_dropout.reference import choose_patches

TILE_ELEMENTS = 4096  # of a copying program: a thread has 32, four loads of 16 bytes in bf16
TILE_WIDTH = 256
TILE_WARPS = 4


@triton.jit(do_not_specialize=["N", "keep"])
def _choose_kernel(
    seed_ptr,  # []
    indices_ptr,  # [B, keep]
    slots_ptr,  # [B, N]
    N,
    keep,
    RANKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0)
    choose_row(seed_ptr, None, indices_ptr, None, None, slots_ptr, b, N, keep, 1, RANKED, BLOCK_N)


@triton.jit(do_not_specialize=["num_taken", "M"])
def _take_kernel(
    x_ptr,  # [B, N, D], strided
    index_ptr,  # [B, M], negative for zeros
    out_ptr,  # [B, M, D]
    num_taken,  # B * M
    M,
    stride_b,
    stride_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    there = rows < num_taken
    index = tl.load(index_ptr + rows, mask=there, other=-1).to(tl.int64)
    within = columns < D

    offsets = rows // M * stride_b + index * stride_n
    taken = (index >= 0)[:, None] & within[None, :]
    x = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=taken, other=0.0)
    out = out_ptr + rows[:, None] * D + columns[None, :]
    tl.store(out, x, mask=there[:, None] & within[None, :])


def drop_patches(x: Tensor, keep: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The op's body on CUDA: see op.py."""
    B, N, _ = x.shape
    indices, slots = choose(seed, B, N, keep, x.device)
    return take_patches(x, indices, slots), indices, slots


def choose(seed: Tensor, B: int, N: int, keep: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices and slots. Of more patches than one program ranks, PyTorch sorts the words."""
    if N > MAX_RANKED:
        return choose_patches(seed, None, B, N, keep, device)[:2]
    indices = torch.empty(B, keep, dtype=torch.int64, device=device)
    slots = torch.empty(B, N, dtype=torch.int32, device=device)
    BLOCK_N, num_warps = block_and_warps(N)
    if B:
        _choose_kernel[(B,)](
            seed, indices, slots, N, keep, RANKED=keep < N, BLOCK_N=BLOCK_N, num_warps=num_warps
        )
    return indices, slots


def take_patches(x: Tensor, index: Tensor, _inverse: Tensor) -> Tensor:
    """The op's body on CUDA: see reference.py."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    index = index.contiguous()
    (B, M), D = index.shape, x.shape[2]
    out = torch.empty(B, M, D, dtype=x.dtype, device=x.device)
    BLOCK_D = min(triton.next_power_of_2(max(D, 1)), TILE_WIDTH)
    BLOCK_M = min(TILE_ELEMENTS // BLOCK_D, triton.next_power_of_2(max(B * M, 1)))
    if out.numel():
        _take_kernel[(triton.cdiv(B * M, BLOCK_M), triton.cdiv(D, BLOCK_D))](
            x, index, out, B * M, M, x.stride(0), x.stride(1),
            D=D, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D, num_warps=TILE_WARPS,
        )  # fmt: skip
    return out
