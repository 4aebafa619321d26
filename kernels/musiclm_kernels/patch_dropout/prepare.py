"""What the embedding of patches needs besides the spectrogram, in one launch: programs choose the
patches of each row, others fold the patch norm's weight and bias into the projection, others tabulate
the positions.

    folded_weight = weight * patch_norm_weight        folded_bias = weight @ patch_norm_bias + bias

The folded weight lies in the order of the rows of patches. The table's first W rows are the position
of each column, zero where that of a row goes, the next H rows the other way round: a token's position
is the sum of two rows of the table.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.patch_dropout.choice import MAX_RANKED, block_and_warps, choose_row
from musiclm_kernels.patch_dropout.launch import Problem
from musiclm_kernels.patch_dropout.patch_rows import patch_places
from musiclm_kernels.patch_dropout.reference import BASE, choose_patches, places

FOLDED_ELEMENTS = 1024  # of the weight, of one program
FOLDING_WARPS = 4

# pi / 2 in three parts; the first two have 8 and 9 bits, so that their products with a whole number
# of quarter turns below 2^15 are exact.
QUARTER_1 = 201 / 128
QUARTER_2 = 507 / 2**20
QUARTER_3 = math.pi / 2 - QUARTER_1 - QUARTER_2


@triton.jit
def _sine_and_cosine(
    angle, QUARTER_1: tl.constexpr, QUARTER_2: tl.constexpr, QUARTER_3: tl.constexpr
):
    """To an fp32 rounding or two. Triton's own keep 32 bytes of each thread in local memory, for
    angles larger than any here."""
    turns = tl.floor(angle * (2 / 3.141592653589793) + 0.5)
    x = angle - turns * QUARTER_1 - turns * QUARTER_2 - turns * QUARTER_3
    square = x * x
    # Taylor's series, of which the next terms are below 2e-9 for |x| <= pi / 4
    sine = 1 / 362880
    sine = sine * square - 1 / 5040
    sine = sine * square + 1 / 120
    sine = sine * square - 1 / 6
    sine = x + x * square * sine
    cosine = -1 / 3628800 * square + 1 / 40320
    cosine = cosine * square - 1 / 720
    cosine = cosine * square + 1 / 24
    cosine = 1 - square * 0.5 + square * square * cosine
    quadrant = turns.to(tl.int32) & 3
    swapped = (quadrant & 1) != 0
    first, second = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    first = tl.where(quadrant >= 2, -first, first)
    second = tl.where((quadrant == 1) | (quadrant == 2), -second, second)
    return first, second


@triton.jit
def _position_row(
    positions_ptr,  # [W + H, PADDED_D]
    place,
    W,
    LOG2_BASE: tl.constexpr,
    QUARTER_1: tl.constexpr,
    QUARTER_2: tl.constexpr,
    QUARTER_3: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    num_frequencies: tl.constexpr = D // 4
    part, frequency = columns // num_frequencies, columns % num_frequencies
    exponent = frequency.to(tl.float32) / (num_frequencies - 1)
    of_column = place < W
    at = tl.where(of_column, place, place - W).to(tl.float32)
    angle = at * tl.exp2(-LOG2_BASE * exponent)
    sine, cosine = _sine_and_cosine(angle, QUARTER_1, QUARTER_2, QUARTER_3)
    value = tl.where(part % 2 == 0, sine, cosine)
    mine = tl.where(of_column, part < 2, part >= 2) & (columns < D)
    value = tl.where(mine, value, 0.0)
    tl.store(positions_ptr + place * PADDED_D + columns, value, mask=columns < PADDED_D)


@triton.jit
def _fold_rows(
    weight_ptr,  # [D, P * P]
    bias_ptr,  # [D]
    patch_norm_weight_ptr,  # [P * P]
    patch_norm_bias_ptr,  # [P * P]
    folded_weight_ptr,  # [PADDED_D, P2 * P2]
    folded_bias_ptr,  # [PADDED_D]
    program,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = program * BLOCK + tl.arange(0, BLOCK)
    frame, bin, real = patch_places(P, P2)
    value = bin * P + frame  # of the weight's row: bins before frames
    norm_weight = tl.load(patch_norm_weight_ptr + value, mask=real, other=0.0).to(tl.float32)
    norm_bias = tl.load(patch_norm_bias_ptr + value, mask=real, other=0.0).to(tl.float32)
    offsets = rows[:, None] * (P * P) + value[None, :]
    mask = (rows < D)[:, None] & real[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + rows, mask=rows < D, other=0.0).to(tl.float32)

    folded = (weight * norm_weight[None, :]).to(folded_weight_ptr.dtype.element_ty)
    to = rows[:, None] * (P2 * P2) + tl.arange(0, P2 * P2)[None, :]
    tl.store(folded_weight_ptr + to, folded, mask=(rows < PADDED_D)[:, None])
    bias += tl.sum(weight * norm_bias[None, :], axis=1)
    tl.store(folded_bias_ptr + rows, bias, mask=rows < PADDED_D)


@triton.jit
def _fold_kernel(
    weight_ptr,
    bias_ptr,
    patch_norm_weight_ptr,
    patch_norm_bias_ptr,
    folded_weight_ptr,
    folded_bias_ptr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _fold_rows(
        weight_ptr, bias_ptr, patch_norm_weight_ptr, patch_norm_bias_ptr,
        folded_weight_ptr, folded_bias_ptr, tl.program_id(0), D, PADDED_D, P, P2, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_choosing", "num_folding", "N", "keep", "W", "H"])
def _prepare_kernel(
    seed_ptr,  # [] or None
    num_valid_ptr,  # [B] or None
    indices_ptr,  # [B, keep]
    codes_ptr,  # [B, keep]
    mask_ptr,  # [B, keep]
    slots_ptr,  # [B, N]
    weight_ptr,
    bias_ptr,
    patch_norm_weight_ptr,
    patch_norm_bias_ptr,
    folded_weight_ptr,
    folded_bias_ptr,
    positions_ptr,  # [W + H, PADDED_D]
    num_choosing,  # programs: B, or 0 where that is done
    num_folding,
    N,
    keep,
    W,
    H,
    LOG2_BASE: tl.constexpr,
    QUARTER_1: tl.constexpr,
    QUARTER_2: tl.constexpr,
    QUARTER_3: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_choosing:
        choose_row(
            seed_ptr, num_valid_ptr, indices_ptr, codes_ptr, mask_ptr, slots_ptr,
            program, N, keep, H, RANKED, BLOCK_N,
        )  # fmt: skip
    elif program < num_choosing + num_folding:
        _fold_rows(
            weight_ptr, bias_ptr, patch_norm_weight_ptr, patch_norm_bias_ptr,
            folded_weight_ptr, folded_bias_ptr, program - num_choosing, D, PADDED_D, P, P2, FOLDED,
        )  # fmt: skip
    else:
        _position_row(
            positions_ptr, program - num_choosing - num_folding, W, LOG2_BASE,
            QUARTER_1, QUARTER_2, QUARTER_3, D, PADDED_D, BLOCK_D,
        )  # fmt: skip


def prepare(
    problem: Problem, num_valid: Tensor | None, seed: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Indices, codes, mask and slots as the op returns them; the folded weight and bias; the table
    of positions."""
    B, W, H, keep, empty = problem.B, problem.W, problem.H, problem.keep, problem.empty
    N = W * H
    ranked = keep < N
    if N > MAX_RANKED:  # PyTorch sorts the words
        device = problem.spectrogram.device
        indices, slots, counts = choose_patches(seed, num_valid, B, N, keep, device)
        codes, key_mask = places(indices, counts, H)
        num_choosing, BLOCK_N, num_warps = 0, 32, FOLDING_WARPS
    else:
        indices, slots = empty(B, keep, dtype=torch.int64), empty(B, N, dtype=torch.int32)
        codes, key_mask = empty(B, keep, dtype=torch.int32), empty(B, keep, dtype=torch.bool)
        num_choosing, (BLOCK_N, num_warps) = B, block_and_warps(N)
    folded, folded_rows, num_folding = _folded(problem)
    positions = empty(W + H, problem.padded_D)
    _prepare_kernel[(num_choosing + num_folding + W + H,)](
        seed, num_valid, indices, codes, key_mask, slots,
        problem.weight, problem.bias, problem.patch_norm_weight, problem.patch_norm_bias,
        *folded, positions, num_choosing, num_folding, N, keep, W, H,
        LOG2_BASE=math.log2(BASE), QUARTER_1=QUARTER_1, QUARTER_2=QUARTER_2, QUARTER_3=QUARTER_3,
        RANKED=ranked, BLOCK_N=BLOCK_N, D=problem.D, PADDED_D=problem.padded_D,
        P=problem.P, P2=problem.P2, FOLDED=folded_rows,
        BLOCK_D=triton.next_power_of_2(problem.padded_D), num_warps=num_warps,
    )  # fmt: skip
    return (indices, codes, key_mask, slots), folded, positions


def fold(problem: Problem) -> tuple[Tensor, Tensor]:
    """The folded weight [padded D, P2 * P2] in the problem's dtype, and bias [padded D] in fp32."""
    folded, folded_rows, num_programs = _folded(problem)
    _fold_kernel[(num_programs,)](
        problem.weight, problem.bias, problem.patch_norm_weight, problem.patch_norm_bias, *folded,
        D=problem.D, PADDED_D=problem.padded_D, P=problem.P, P2=problem.P2, BLOCK=folded_rows,
        num_warps=FOLDING_WARPS,
    )  # fmt: skip
    return folded


def _folded(problem: Problem) -> tuple[tuple[Tensor, Tensor], int, int]:
    """Room for both, rows of a program, and programs."""
    width = problem.P2**2
    rows = max(FOLDED_ELEMENTS // width, 1)
    weight = problem.empty(problem.padded_D, width, dtype=problem.dtype)
    return (weight, problem.empty(problem.padded_D)), rows, triton.cdiv(problem.padded_D, rows)
