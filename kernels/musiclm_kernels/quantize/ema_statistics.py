"""The first step of the training of residual codebooks in Triton: counts, sums and draws.

A program is one warp that holds BLOCK_N whole rows: their residuals stay in registers through all
levels, and each is added to its code's sum as a 64-bit integer. The sums of integers do not depend
on the order. Their unit is a power of two from the largest magnitude there is, which a first pass
finds, so that no sum overflows. Nothing waits for the device.

Dimensions: N rows, Q levels (q of them have codes), K codes a level, D width.

Bound by the atomics: N q D of 8 bytes at the L2, a row and level all in one stretch of memory; beside
them N q D of 4 bytes are read, from codebooks that the L2 holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A lane has one element of a row at a time, so that the addresses of an atomic lie side by side; it
# holds 16 of them, and a warp no more rows than it has lanes.
WARP_ELEMENTS = 512
WARP_ROWS = 32
TILE_ELEMENTS = 2048  # where rows are only copied
PEAK_PROGRAMS = 1024  # several waves of any GPU, which leave one atomic each
BITS = 62  # of a sum at the most, so that rounding cannot overflow 63

NOBODY = tl.constexpr(2**63 - 1)  # a draw that no row entered
ROW = tl.constexpr(2**32 - 1)  # the bits of a draw that number its row
INFINITY = tl.constexpr(0x7F800000)  # bits of float32; those of finite magnitudes are less
LARGEST_EXPONENT = tl.constexpr(126)  # so that the inverse is a normal number too


@triton.jit
def _magnitude_bits(x):
    """The bits of |x| as int32, which order as |x| does."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _unit_exponent(peak_ptr, bits):
    """log2 of the integers in one: a magnitude under the peak takes `bits` bits at the most."""
    exponent = (tl.load(peak_ptr).to(tl.int32) >> 23) - 126  # the peak is under 2^exponent
    return tl.minimum(bits - exponent, LARGEST_EXPONENT)


@triton.jit
def _peak_of_rows(
    ptr,
    stride,
    num_rows,
    first,
    step,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    peak = tl.zeros([BLOCK_N, BLOCK_D], tl.int32)
    for start in tl.range(first * BLOCK_N, num_rows, step * BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        at = row.to(tl.int64)[:, None] * stride + d[None, :]
        mask = (row < num_rows)[:, None] & (d < D)[None, :]
        bits = _magnitude_bits(tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32))
        peak = tl.maximum(peak, tl.where(bits < INFINITY, bits, 0))
    return tl.max(peak)


@triton.jit(do_not_specialize=["N", "num_codes"])
def _peak_kernel(
    x_ptr,  # [N, D], strided
    codebook_ptr,  # [Q, K, D]
    peak_ptr,  # [1] int64
    N,
    num_codes,  # Q * K
    stride_x,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The largest finite magnitude of x and of the codebooks, as the bits of a float32."""
    program, step = tl.program_id(0), tl.num_programs(0)
    rows = _peak_of_rows(x_ptr, stride_x, N, program, step, D, BLOCK_N, BLOCK_D)
    books = _peak_of_rows(codebook_ptr, D, num_codes, program, step, D, BLOCK_N, BLOCK_D)
    tl.atomic_max(peak_ptr, tl.maximum(rows, books).to(tl.int64), sem="relaxed")


@triton.jit(
    do_not_specialize=["N", "q", "K", "first_row", "bits"],
    do_not_specialize_on_alignment=["x_ptr", "codebook_ptr"],
)
def _statistics_kernel(
    x_ptr,  # [N, D], strided
    code_ptr,  # [N, q], strided
    codebook_ptr,  # [Q, K, D]
    seed_ptr,  # []
    peak_ptr,  # [1] int64
    count_ptr,  # [Q, K] int64
    sum_ptr,  # [Q, K, D] int64
    draw_ptr,  # [Q, K] int64
    N,
    q,
    K,
    first_row,
    bits,
    stride_x,
    stride_code,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = row < N
    inside_d = (d < D)[None, :]
    at = row[:, None] * stride_x + d[None, :]
    residual = tl.load(x_ptr + at, mask=inside[:, None] & inside_d, other=0.0).to(tl.float32)
    unit = _power_of_two(_unit_exponent(peak_ptr, bits))
    seed = tl.load(seed_ptr)
    number = row + first_row
    word = number.to(tl.uint32)

    for level in range(q):
        code = tl.load(code_ptr + row * stride_code + level, mask=inside, other=-1).to(tl.int64)
        has_code = (code >= 0) & (code < K)
        counts = has_code & (tl.max(_magnitude_bits(residual), axis=1) < INFINITY)
        base = tl.cast(level, tl.int64) * K
        entry = base + tl.where(has_code, code, 0)
        at = entry[:, None] * D + d[None, :]
        whole = (tl.where(counts[:, None], residual, 0.0) * unit).to(tl.int64)
        tl.atomic_add(sum_ptr + at, whole, mask=counts[:, None] & inside_d, sem="relaxed")
        tl.atomic_add(
            count_ptr + entry, tl.full([BLOCK_N], 1, tl.int64), mask=counts, sem="relaxed"
        )

        zero = tl.zeros_like(word)
        first, second, _, _ = tl.philox(seed, word, zero + level, zero, zero)
        slot = base + ((first.to(tl.int64) * K) >> 32)
        draw = ((second >> 1).to(tl.int64) << 32) | number
        tl.atomic_min(draw_ptr + slot, draw, mask=counts, sem="relaxed")
        residual -= tl.load(codebook_ptr + at, mask=has_code[:, None] & inside_d, other=0.0)


@triton.jit(do_not_specialize=["num_codes", "bits"])
def _collect_kernel(
    whole_count_ptr,  # [num_codes] int64
    whole_sum_ptr,  # [num_codes, D] int64
    peak_ptr,  # [1] int64
    count_ptr,  # [num_codes]
    sum_ptr,  # [num_codes, D]
    num_codes,  # Q * K
    bits,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From integers to float32, rounded once."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = entry < num_codes
    count = tl.load(whole_count_ptr + entry, mask=inside)
    tl.store(count_ptr + entry, count.to(tl.float32), mask=inside)
    at = entry[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    total = tl.load(whole_sum_ptr + at, mask=mask).to(tl.float32)
    tl.store(sum_ptr + at, total * _power_of_two(-_unit_exponent(peak_ptr, bits)), mask=mask)


def rvq_statistics(
    codebooks: Tensor, x: Tensor, codes: Tensor, seed: Tensor, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's body on CUDA: see ema.py."""
    (N, D), (Q, K, _), q = x.shape, codebooks.shape, codes.shape[1]
    x, codes, codebooks = with_rows_packed(x), with_rows_packed(codes), codebooks.contiguous()
    counts, sums = codebooks.new_empty(Q, K), codebooks.new_empty(Q, K, D)
    draws = torch.full((Q, K), NOBODY.value, dtype=torch.int64, device=x.device)
    # The peak, the counts and the sums, as integers.
    whole = torch.zeros(1 + Q * K * (1 + D), dtype=torch.int64, device=x.device)
    peak, whole_counts, whole_sums = whole.split([1, Q * K, Q * K * D])
    # A residual of level l is less than l + 1 peaks, and N of them are added at the most.
    bits = BITS - (N * q).bit_length()
    BLOCK_K, BLOCK_D = tile(D, Q * K)
    if N * q > 0:
        tiles = triton.cdiv(max(N, Q * K), BLOCK_K)
        _peak_kernel[(min(tiles, PEAK_PROGRAMS),)](
            x, codebooks, peak, N, Q * K, x.stride(0), D=D, BLOCK_N=BLOCK_K, BLOCK_D=BLOCK_D
        )
        BLOCK_N = min(max(WARP_ELEMENTS // BLOCK_D, 1), WARP_ROWS)
        _statistics_kernel[(triton.cdiv(N, BLOCK_N),)](
            x, codes, codebooks, seed, peak, whole_counts, whole_sums, draws,
            N, q, K, first_row, bits, x.stride(0), codes.stride(0),
            D=D, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
            num_warps=max(BLOCK_D // WARP_ELEMENTS, 1), num_stages=1,
        )  # fmt: skip
    _collect_kernel[(triton.cdiv(Q * K, BLOCK_K),)](
        whole_counts, whole_sums, peak, counts, sums, Q * K, bits,
        D=D, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    return counts, sums, draws


def with_rows_packed(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def tile(D: int, num_rows: int) -> tuple[int, int]:
    """Rows and columns of a program's tile: whole rows, TILE_ELEMENTS or fewer."""
    BLOCK_D = triton.next_power_of_2(D)
    return min(max(TILE_ELEMENTS // BLOCK_D, 1), triton.next_power_of_2(num_rows)), BLOCK_D
