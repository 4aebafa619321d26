"""The contrastive losses in Triton. A program owns a block of rows of one side and one layer, and
walks over all rows of the other side, so that no sum crosses programs.

Dimensions: L layers, B pairs, D width; `count` own pairs from `first` on. Sides: 0 audio, 1 text.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Weights are multiplied by 2^12 before their product with the rows: fp16 holds 1 / 65536 with eleven
# digits then, and their bound, 2, too.
GAIN_BITS = tl.constexpr(12.0)
GAIN = tl.constexpr(4096.0)
LOWEST = tl.constexpr(-3.0e38)  # below any score that is finite
SMALLEST = tl.constexpr(1.2e-38)
# Up to here, on both sides, half as many rows a program still are no more programs than a GPU of 132
# multiprocessors runs at once.
FEW_ROWS = 4096


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: own rows and others of a tile, the width that is multiplied at a time and
    that of the gradient a program holds, and Triton's launch options."""

    block_n: int
    block_m: int
    chunk: int
    width: int
    num_warps: int
    num_stages: int


def contrastive_statistics(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher: `reference.contrastive_statistics` in one kernel and the sum over its rows."""
    L, B, D = audio.shape
    sides = 1 if kind == "sigmoid" else 2
    log_sums = torch.empty(
        4 if sides == 2 else 0, L, count, dtype=torch.float32, device=audio.device
    )
    terms = torch.empty(sides, 3, L, count, dtype=torch.float32, device=audio.device)
    config = statistics_config(audio, kind, count)
    grid = (triton.cdiv(count, config.block_n) * L * sides,)
    if grid[0]:
        _statistics[grid](
            audio.contiguous(), text.contiguous(), temperature, bias, log_sums, terms,
            temperature.stride(0), 0 if bias is None else bias.stride(0), L, B, first, count,
            KIND=kind, SIDES=sides, D=D, EVEN=B % config.block_m == 0, WHOLE=config.chunk >= D,
            PRECISION=_precision(audio), BLOCK_N=config.block_n, BLOCK_M=config.block_m,
            CHUNK=config.chunk, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return terms[:, 0].sum((0, 2)), log_sums, terms[:, 1:].sum((0, 3))


def contrastive_gradient(
    grad: Tensor,
    audio: Tensor,
    text: Tensor,
    log_sums: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The launcher: `reference.contrastive_gradient` in one kernel."""
    L, B, D = audio.shape
    grad_audio, grad_text = (
        torch.empty(L, count, D, dtype=x.dtype, device=x.device) for x in (audio, text)
    )
    config = gradient_config(audio, count)
    num_chunks = triton.cdiv(D, config.width)
    grid = (num_chunks * triton.cdiv(count, config.block_n) * L * 2,)
    if grid[0]:
        _gradient[grid](
            audio.contiguous(), text.contiguous(), log_sums.contiguous(), temperature, bias, grad,
            grad_audio, grad_text,
            temperature.stride(0), 0 if bias is None else bias.stride(0), grad.stride(0),
            L, B, first, count,
            KIND=kind, D=D, EVEN=B % config.block_m == 0, WHOLE=config.chunk >= D,
            PRECISION=_precision(audio), BLOCK_N=config.block_n, BLOCK_M=config.block_m,
            CHUNK=config.chunk, WIDTH=config.width,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return grad_audio, grad_text


def _precision(x: Tensor) -> str:
    exact = x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


# Chosen from what Triton 3.6 makes of them (docs/kernels/contrastive.md), so that nothing spills; not
# yet timed.


def statistics_config(audio: Tensor, kind: str, count: int) -> Config:
    L, B, D = audio.shape
    chunk = min(max(16, triton.next_power_of_2(D)), 128)
    if audio.dtype == torch.float32:
        return Config(32, 32, chunk if D <= 128 else 64, 0, 8, 2)
    few = L * count <= FEW_ROWS
    if D > 128:
        return Config(64 if few else 128, 64, 64, 0, 4 if few else 8, 3)
    if kind == "sigmoid":
        return Config(64, 64, chunk, 0, 4, 2)
    block_m = 64 if few or B % 128 else 128  # a mask beside a tile of 128 spills
    return Config(64 if few else 128, block_m, chunk, 0, 4 if few else 8, 3)


def gradient_config(audio: Tensor, count: int) -> Config:
    L, _, D = audio.shape
    wide = max(16, triton.next_power_of_2(D))
    if audio.dtype == torch.float32:
        return Config(32, 32, min(wide, 128), min(wide, 128), 8, 2)
    few = L * count <= FEW_ROWS
    if D <= 128:
        return Config(64 if few else 128, 64, wide, wide, 4 if few else 8, 3)
    return Config(64, 64, min(wide, 256), min(wide, 256), 8, 2)


@triton.jit
def _rows(
    ptr,
    num_rows,
    start,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[ROWS, COLUMNS] from column `start` on; zeros beyond num_rows (unless EVEN) and beyond D."""
    r = tl.arange(0, ROWS)[:, None]
    d = start + tl.arange(0, COLUMNS)[None, :]
    if EVEN and D % COLUMNS == 0:
        rows = tl.load(ptr + r * D + d)
    elif EVEN:
        rows = tl.load(ptr + r * D + d, mask=d < D, other=0.0)
    elif D % COLUMNS == 0:
        rows = tl.load(ptr + r * D + d, mask=r < num_rows, other=0.0)
    else:
        rows = tl.load(ptr + r * D + d, mask=(r < num_rows) & (d < D), other=0.0)
    return rows


@triton.jit
def _products(
    own, own_ptr, other_ptr, num_own, num_other,
    D: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_M], of rows from both pointers on; WHOLE: `own` holds the own ones."""
    if WHOLE:
        other = _rows(other_ptr, num_other, 0, D, BLOCK_M, CHUNK, EVEN)
        products = tl.dot(own, tl.trans(other), input_precision=PRECISION)
    else:
        products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in tl.range(0, D, CHUNK):
            part = _rows(own_ptr, num_own, start, D, BLOCK_N, CHUNK, False)
            other = _rows(other_ptr, num_other, start, D, BLOCK_M, CHUNK, EVEN)
            products = tl.dot(part, tl.trans(other), products, input_precision=PRECISION)
    return products


@triton.jit
def _log1p(e):
    """log(1 + e) of 0 <= e <= 1 to 2e-7 of itself, which the hardware's logarithm is not near 1: e
    times a polynomial of the least relative error, by Lawson's iteration."""
    p = 0.00523262408 * e - 0.0295049575
    p = p * e + 0.0782254939
    p = p * e - 0.136632069
    p = p * e + 0.191059885
    p = p * e - 0.248429775
    p = p * e + 0.333190962
    p = p * e - 0.499994931
    p = p * e + 0.99999997
    return p * e


@triton.jit(do_not_specialize=["L", "first", "count"])
def _statistics(
    audio_ptr,  # [L, B, D], packed
    text_ptr,  # [L, B, D], packed
    temperature_ptr,  # [L]
    bias_ptr,  # [L] or None
    log_sum_ptr,  # [4, L, count], packed; not written for sigmoid
    term_ptr,  # [SIDES, 3, L, count], packed: of the loss, its slopes in temperature and in bias
    stride_temperature,
    stride_bias,
    L,
    B,
    first,
    count,
    KIND: tl.constexpr,
    SIDES: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,  # B is a multiple of BLOCK_M
    WHOLE: tl.constexpr,  # a row is one chunk
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    num_blocks = tl.cdiv(count, BLOCK_N)
    local = tl.program_id(0) % num_blocks * BLOCK_N
    layer = (tl.program_id(0) // num_blocks % L).to(tl.int64)
    side = tl.program_id(0) // (num_blocks * L)
    own_ptr = tl.where(side == 0, audio_ptr, text_ptr) + layer * B * D
    other_ptr = tl.where(side == 0, text_ptr, audio_ptr) + layer * B * D
    begin = first + local
    own_ptr += tl.cast(begin, tl.int64) * D
    row = begin + tl.arange(0, BLOCK_N)
    temperature = tl.load(temperature_ptr + layer * stride_temperature).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + layer * stride_bias).to(tl.float32)
    own = temperature
    if WHOLE:
        own = _rows(own_ptr, count - local, 0, D, BLOCK_N, CHUNK, False)

    # The own pairs' products first: the walk over all of them then needs no look at the diagonal.
    positive = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + BLOCK_N, B), BLOCK_M):
        products = _products(
            own, own_ptr, other_ptr + tl.cast(start, tl.int64) * D, count - local, B - start,
            D, WHOLE, False, PRECISION, BLOCK_N, BLOCK_M, CHUNK,
        )  # fmt: skip
        pair = row[:, None] == (start + tl.arange(0, BLOCK_M))[None, :]
        positive += tl.sum(tl.where(pair, products, 0.0), 1)

    if KIND == "sigmoid":
        loss = tl.zeros([BLOCK_N], tl.float32)
        by_temperature = tl.zeros([BLOCK_N], tl.float32)
        by_bias = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(0, B, BLOCK_M):
            products = _products(
                own, own_ptr, other_ptr + tl.cast(start, tl.int64) * D, count - local, B - start,
                D, WHOLE, EVEN, PRECISION, BLOCK_N, BLOCK_M, CHUNK,
            )  # fmt: skip
            column = start + tl.arange(0, BLOCK_M)
            counts = row[:, None] != column[None, :]
            if not EVEN:
                counts = counts & (column < B)[None, :]
            cost, slope = _softplus(products * temperature + bias)
            slope = tl.where(counts, slope, 0.0)
            loss += tl.sum(tl.where(counts, cost, 0.0), 1)
            by_temperature += tl.sum(slope * products, 1)
            by_bias += tl.sum(slope, 1)
        cost, slope = _softplus(-(positive * temperature + bias))
        loss += cost
        by_temperature -= slope * positive
        by_bias -= slope
    else:
        highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        mean = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(0, B, BLOCK_M):
            products = _products(
                own, own_ptr, other_ptr + tl.cast(start, tl.int64) * D, count - local, B - start,
                D, WHOLE, EVEN, PRECISION, BLOCK_N, BLOCK_M, CHUNK,
            )  # fmt: skip
            column = start + tl.arange(0, BLOCK_M)
            scores = products * (temperature * LOG2_E)
            # The own pair apart: what it adds to the sum would drown what the others do.
            scores = tl.where(row[:, None] == column[None, :], float("-inf"), scores)
            if not EVEN:
                scores = tl.where((column < B)[None, :], scores, float("-inf"))
            # Not -inf, which a row without rivals would leave it at.
            higher = tl.maximum(highest, tl.maximum(tl.max(scores, 1), LOWEST))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink + tl.sum(weights * products, 1)
            highest = higher
        own_score = positive * temperature
        ahead = (highest + tl.log2(total)) * LN_2 - own_score
        mean /= tl.maximum(total, SMALLEST)
        if KIND == "decoupled":
            loss = ahead
            rivals_share = tl.full([BLOCK_N], 1.0, tl.float32)
        else:
            loss, rivals_share = _softplus(ahead)
        by_temperature = rivals_share * (mean - positive)
        by_bias = tl.zeros([BLOCK_N], tl.float32)
        place = log_sum_ptr + (side * L + layer) * count + local + tl.arange(0, BLOCK_N)
        tl.store(place, own_score + loss, mask=row < first + count)
        place += 2 * tl.cast(L, tl.int64) * count
        tl.store(place, rivals_share, mask=row < first + count)

    share = 1.0 / tl.cast(SIDES * B, tl.float32)
    place = term_ptr + (side * 3 * L + layer) * count + local + tl.arange(0, BLOCK_N)
    step = tl.cast(L, tl.int64) * count
    tl.store(place, loss * share, mask=row < first + count)
    tl.store(place + step, by_temperature * share, mask=row < first + count)
    tl.store(place + 2 * step, by_bias * share, mask=row < first + count)


@triton.jit
def _softplus(x):
    """log(1 + exp x) and its derivative."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.maximum(x, 0.0) + _log1p(e), tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit(do_not_specialize=["L", "first", "count"])
def _gradient(
    audio_ptr,  # [L, B, D], packed
    text_ptr,  # [L, B, D], packed
    log_sum_ptr,  # [4, L, B], packed; not read for sigmoid
    temperature_ptr,  # [L]
    bias_ptr,  # [L] or None
    grad_ptr,  # [L], of the losses
    grad_audio_ptr,  # [L, count, D], packed
    grad_text_ptr,  # [L, count, D], packed
    stride_temperature,
    stride_bias,
    stride_grad,
    L,
    B,
    first,
    count,
    KIND: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,  # B is a multiple of BLOCK_M
    WHOLE: tl.constexpr,  # a row is one chunk
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,  # of the gradient that a program holds; CHUNK if WHOLE
):
    num_blocks = tl.cdiv(count, BLOCK_N)
    num_parts: tl.constexpr = (D + WIDTH - 1) // WIDTH
    part = tl.program_id(0) % num_parts * WIDTH
    local = tl.program_id(0) // num_parts % num_blocks * BLOCK_N
    layer = (tl.program_id(0) // (num_parts * num_blocks) % L).to(tl.int64)
    side = tl.program_id(0) // (num_parts * num_blocks * L)
    own_ptr = tl.where(side == 0, audio_ptr, text_ptr) + layer * B * D
    other_ptr = tl.where(side == 0, text_ptr, audio_ptr) + layer * B * D
    begin = first + local
    own_ptr += tl.cast(begin, tl.int64) * D
    row = begin + tl.arange(0, BLOCK_N)
    temperature = tl.load(temperature_ptr + layer * stride_temperature).to(tl.float32)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + layer * stride_bias).to(tl.float32)
    own = temperature
    if WHOLE:
        own = _rows(own_ptr, count - local, 0, D, BLOCK_N, CHUNK, False)
    other_log_sum_ptr = log_sum_ptr + ((1 - side) * L + layer) * B
    log_sum = temperature
    by_own = temperature
    if KIND != "sigmoid":
        place = log_sum_ptr + layer * B + tl.minimum(row, B - 1)
        step = tl.cast(L, tl.int64) * B
        log_sum = tl.load(place + side * step) * LOG2_E - GAIN_BITS
        # All slopes of a row add up to zero: no small number is left of two that are nearly 1.
        by_own = -GAIN * (tl.load(place + 2 * step) + tl.load(place + 3 * step))

    grad = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start in tl.range(0, B, BLOCK_M):
        tile_ptr = other_ptr + tl.cast(start, tl.int64) * D
        if WHOLE:
            other = _rows(tile_ptr, B - start, 0, D, BLOCK_M, CHUNK, EVEN)
            products = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        else:
            products = _products(
                own, own_ptr, tile_ptr, count - local, B - start,
                D, WHOLE, EVEN, PRECISION, BLOCK_N, BLOCK_M, CHUNK,
            )  # fmt: skip
            other = _rows(tile_ptr, B - start, part, D, BLOCK_M, WIDTH, EVEN)
        column = start + tl.arange(0, BLOCK_M)
        pair = row[:, None] == column[None, :]
        if KIND == "sigmoid":
            scores = products * temperature + bias
            scores = tl.where(pair, -scores, scores)
            weights = GAIN / (1.0 + tl.exp2(-scores * LOG2_E))
            weights = tl.where(pair, -weights, weights)
        else:
            scores = products * (temperature * LOG2_E)
            if EVEN:
                other_log_sum = tl.load(other_log_sum_ptr + column)
            else:
                other_log_sum = tl.load(other_log_sum_ptr + column, mask=column < B, other=0.0)
            other_log_sum = other_log_sum * LOG2_E - GAIN_BITS
            weights = tl.exp2(scores - log_sum[:, None])
            weights += tl.exp2(scores - other_log_sum[None, :])
            weights = tl.where(pair, by_own[:, None], weights)
        if not EVEN:
            weights = tl.where((column < B)[None, :], weights, 0.0)
        grad = tl.dot(weights.to(other.dtype), other, grad, input_precision=PRECISION)

    num_terms = B
    if KIND != "sigmoid":
        num_terms = 2 * B
    scale = tl.load(grad_ptr + layer * stride_grad).to(tl.float32) * temperature
    grad *= scale / (GAIN * tl.cast(num_terms, tl.float32))
    d = part + tl.arange(0, WIDTH)[None, :]
    out_ptr = tl.where(side == 0, grad_audio_ptr, grad_text_ptr)
    out_ptr += (layer * count + local) * D
    local_row = tl.arange(0, BLOCK_N)[:, None]
    inside = (local_row < count - local) & (d < D)
    tl.store(out_ptr + local_row * D + d, grad.to(out_ptr.dtype.element_ty), mask=inside)
