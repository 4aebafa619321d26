"""Residual vector quantisation in Triton. A program owns a block of vectors: their residual stays in
registers through all levels, and no distance leaves the chip.

Dimensions: N vectors, Q levels, K codes a level, D width. A level's nearest code has the smallest
|c|^2 - 2 r.c. The products run on the tensor cores in fp16, the sums in fp32. Powers of two bring
every level and every residual to where fp16 is finest, so that no value over- or underflows. In
"exact" mode each factor is two fp16 numbers, which keep 22 bits of it, and a product three; the
error this leaves is derived in docs/kernels/quantize.md.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.quantize.encode_tile import (
    TOP,
    exponent,
    look_up,
    nearest,
    power_of_two,
    split,
    store_results,
)

MAX_D = 512  # what has been compiled without spilling
FEW_ROWS = 8192  # half of an H100's 132 multiprocessors would have no program of 128 rows
PREPARED_ELEMENTS = 2048  # of a program that prepares codebooks: 16 a thread
COLUMNS = 64  # of a residual in memory that pass through the registers at once


@dataclass(frozen=True)
class Config:
    """How a kernel is cut.

    Attributes:
        block_n: vectors of a program.
        block_k: codes of a tile.
        num_warps, num_stages: Triton's.
        in_memory: the residual is, where registers do not hold it; it stays in the L2 cache.
        part: columns that are multiplied at once; None is all.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    in_memory: bool = False
    part: int | None = None


@triton.jit
def _prepare_kernel(
    codebooks_ptr,  # [Q, K, D]
    largest_ptr,  # [Q]
    high_ptr,  # [Q, padded K, BLOCK_D] fp16
    low_ptr,  # the same, of what `high` leaves; not in "fast" mode
    norms_ptr,  # [Q, padded K] fp32, +inf where there is no code
    K,
    padded_K,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    level = tl.program_id(1).to(tl.int64)
    codes = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_D)
    mask = (codes < K)[:, None] & (columns < D)[None, :]
    offsets = (level * K + codes)[:, None] * D + columns[None, :]
    book = tl.load(codebooks_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    top = exponent(tl.load(largest_ptr + level).to(tl.float32))
    book *= power_of_two(-top + TOP)
    norms = tl.where(codes < K, tl.sum(book * book, axis=1), float("inf"))
    high, low = split(book)

    rows = level * padded_K + codes
    padded = rows[:, None] * BLOCK_D + columns[None, :]
    kept = (codes < padded_K)[:, None]
    tl.store(high_ptr + padded, high, mask=kept)
    if EXACT:
        tl.store(low_ptr + padded, low, mask=kept)
    tl.store(norms_ptr + rows, norms, mask=codes < padded_K)


@triton.jit
def _encode_kernel(
    x_ptr,  # [N, D], rows strided
    codebooks_ptr,  # [Q, K, D]
    largest_ptr,  # [Q]
    high_ptr,  # [Q, padded K, BLOCK_D] fp16
    low_ptr,  # the same, of what `high` leaves; not in "fast" mode
    norms_ptr,  # [Q, padded K] fp32
    codes_ptr,  # [N, Q] int64
    quantized_ptr,  # [N, D] fp32
    N,
    Q,
    K,
    padded_K,
    stride_xn,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    levels = tl.arange(0, BLOCK_Q)
    mask = (rows < N - first_row)[:, None] & (columns < D)[None, :]
    offsets = (first_row + rows)[:, None] * stride_xn + columns[None, :]
    residual = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)

    all_codes = tl.zeros((BLOCK_N, BLOCK_Q), dtype=tl.int32)
    for level in range(Q):
        top = exponent(tl.max(tl.abs(residual), axis=1))
        high, low = split(residual * power_of_two(-top + TOP)[:, None])
        code = nearest(
            high, low, high_ptr, low_ptr, top, largest_ptr, high_ptr, low_ptr, norms_ptr, level,
            padded_K, EXACT, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_D,
        )  # fmt: skip
        all_codes = tl.where((levels == level)[None, :], code[:, None], all_codes)
        level_ptr = codebooks_ptr + tl.cast(level, tl.int64) * K * D
        residual -= look_up(level_ptr, code, columns, mask, D)
    store_results(
        all_codes, codebooks_ptr, codes_ptr + first_row * Q, quantized_ptr + first_row * D,
        N - first_row, Q, K, D, BLOCK_N, BLOCK_D, BLOCK_Q, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _encode_wide_kernel(
    own_high_ptr,  # [padded N, BLOCK_D] fp16, scratch: the scaled residual
    own_low_ptr,  # the same, of what `own_high` leaves; not in "fast" mode
    codebooks_ptr,  # [Q, K, D]
    largest_ptr,  # [Q]
    high_ptr,  # [Q, padded K, BLOCK_D] fp16
    low_ptr,  # the same, of what `high` leaves; not in "fast" mode
    norms_ptr,  # [Q, padded K] fp32
    codes_ptr,  # [N, Q] int64
    quantized_ptr,  # [N, D] fp32; holds x at first, then the residual
    N,
    Q,
    K,
    padded_K,
    D: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    own_ptr = quantized_ptr + first_row * D
    own_high_ptr += first_row * BLOCK_D
    own_low_ptr += first_row * BLOCK_D
    rows = tl.arange(0, BLOCK_N)
    few = tl.arange(0, COLUMNS)
    levels = tl.arange(0, BLOCK_Q)

    all_codes = tl.zeros((BLOCK_N, BLOCK_Q), dtype=tl.int32)
    code = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for level in range(Q):
        largest = tl.zeros((BLOCK_N,), dtype=tl.float32)
        level_ptr = codebooks_ptr + (tl.cast(level, tl.int64) - 1) * K * D
        for column in range(0, BLOCK_D, COLUMNS):
            mask = (rows < N - first_row)[:, None] & (column + few < D)[None, :]
            offsets = rows[:, None] * D + (column + few)[None, :]
            residual = tl.load(own_ptr + offsets, mask=mask, other=0.0)
            residual -= look_up(level_ptr, code, column + few, mask & (level > 0), D)
            tl.store(own_ptr + offsets, residual, mask=mask)
            largest = tl.maximum(largest, tl.max(tl.abs(residual), axis=1))
        tl.debug_barrier()  # from here to the next one, threads load what others have stored
        top = exponent(largest)
        scale = power_of_two(-top + TOP)
        for column in range(0, BLOCK_D, COLUMNS):
            mask = (rows < N - first_row)[:, None] & (column + few < D)[None, :]
            offsets = rows[:, None] * D + (column + few)[None, :]
            residual = tl.load(own_ptr + offsets, mask=mask, other=0.0)
            part_high, part_low = split(residual * scale[:, None])
            offsets = rows[:, None] * BLOCK_D + (column + few)[None, :]
            tl.store(own_high_ptr + offsets, part_high)
            if EXACT:
                tl.store(own_low_ptr + offsets, part_low)
        tl.debug_barrier()
        factors = rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        high = tl.load(own_high_ptr + factors)
        low = high
        if EXACT:
            low = tl.load(own_low_ptr + factors)
        code = nearest(
            high, low, own_high_ptr, own_low_ptr, top, largest_ptr, high_ptr, low_ptr, norms_ptr,
            level, padded_K, EXACT, BLOCK_N, BLOCK_K, BLOCK_D, PART,
        )  # fmt: skip
        all_codes = tl.where((levels == level)[None, :], code[:, None], all_codes)
        tl.debug_barrier()  # the factors are read before they are overwritten
    store_results(
        all_codes, codebooks_ptr, codes_ptr + first_row * Q, own_ptr, N - first_row, Q, K,
        D, BLOCK_N, BLOCK_D, BLOCK_Q, COLUMNS,
    )  # fmt: skip


def rvq_encode(x: Tensor, codebooks: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """The op's body on CUDA: a reduction, a preparation of the codebooks, and all levels at once."""
    (N, D), (Q, K, _) = x.shape, codebooks.shape
    if not 1 <= D <= MAX_D:
        raise ValueError(f"x has width {D}, wanted 1 to {MAX_D} on CUDA")
    if K * D >= 2**31:
        raise ValueError(f"codebooks has {K} codes of width {D}, wanted K D under 2^31 on CUDA")
    codes = torch.empty((N, Q), dtype=torch.int64, device=x.device)
    quantized = torch.empty((N, D), dtype=torch.float32, device=x.device)
    if N == 0:
        return codes, quantized
    x = x if x.stride(1) == 1 else x.contiguous()
    codebooks = codebooks.contiguous()
    exact = mode == "exact"
    BLOCK_D = max(16, triton.next_power_of_2(D))
    config = encode_config(N, BLOCK_D, exact, _arch(x))
    padded_K = triton.cdiv(K, config.block_k) * config.block_k
    num_programs = triton.cdiv(N, config.block_n)

    largest = torch.linalg.vector_norm(codebooks, math.inf, (1, 2))
    half = partial(torch.empty, dtype=torch.float16, device=x.device)
    high, low = _two_or_one(half((1 + exact, Q, padded_K, BLOCK_D)))
    norms = torch.empty((Q, padded_K), dtype=torch.float32, device=x.device)
    block_k = max(1, PREPARED_ELEMENTS // BLOCK_D)
    _prepare_kernel[(triton.cdiv(padded_K, block_k), Q)](
        codebooks, largest, high, low, norms, K, padded_K,
        D=D, EXACT=exact, BLOCK_K=block_k, BLOCK_D=BLOCK_D,
    )  # fmt: skip

    books = (codebooks, largest, high, low, norms)
    sizes = (N, Q, K, padded_K)
    constants = {
        "D": D, "EXACT": exact, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "BLOCK_D": BLOCK_D, "BLOCK_Q": triton.next_power_of_2(Q),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if config.in_memory:
        quantized.copy_(x)
        own = half((1 + exact, num_programs * config.block_n, BLOCK_D))
        _encode_wide_kernel[(num_programs,)](
            *_two_or_one(own), *books, codes, quantized, *sizes,
            COLUMNS=COLUMNS, PART=config.part or BLOCK_D, **constants,
        )  # fmt: skip
    else:
        _encode_kernel[(num_programs,)](
            x, *books, codes, quantized, *sizes, x.stride(0), **constants
        )
    return codes, quantized


def _two_or_one(parts: Tensor) -> tuple[Tensor, Tensor]:
    """High and low parts; "fast" mode has no low ones, and its kernels do not read them."""
    return parts[0], parts[-1]


def _arch(x: Tensor) -> int:
    """Compute capability times ten; Hopper's in the interpreter, which has none."""
    if x.device.type == "cpu":
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def relative_error(mode: str, D: int) -> float:
    """By how much a computed |c|^2 - 2 r.c can be wrong, as a share of |c|^2 + 2 |r| |c|, where r is
    the residual as the kernel has it. Derived in docs/kernels/quantize.md."""
    of_factors = 3 * 2.0**-22 if mode == "exact" else 2.0**-10
    return of_factors + (D + 8) * 2.0**-22


def encode_config(N: int, BLOCK_D: int, exact: bool, arch: int) -> Config:
    """Chosen from what Triton 3.6 makes of them (docs/kernels/quantize.md), so that nothing spills;
    not yet timed."""
    if arch < 90:
        if BLOCK_D <= 128:
            return Config(64 if exact else 128, 32, 8, 2)
        if BLOCK_D <= 256:
            return Config(64, 16 if exact else 64, 8, 2, in_memory=True)
        return Config(64, 32 if exact else 64, 8, 2, in_memory=True, part=64 if exact else 128)
    if arch >= 100:
        if BLOCK_D <= 128:
            return Config(64, 128, 8, 1 if exact else 2)
        return Config(64, 64, 8, 2, in_memory=True, part=64 if exact else 128)
    if BLOCK_D <= 128:
        return Config(64, 64, 4, 2) if N <= FEW_ROWS else Config(128, 64, 8, 2)
    if BLOCK_D <= 256:
        return Config(128, 32 if exact else 64, 8, 2, in_memory=True)
    return Config(64 if exact else 128, 16 if exact else 32, 8, 2, in_memory=True)
