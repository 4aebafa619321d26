"""The launcher of decode attention, and how slots are divided among programs."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from musiclm_kernels.decode.kernel import attend
from musiclm_kernels.target import check_float8, dependent_launch

MAX_D = 256  # one program's registers hold the keys and values of a split up to here


@dataclass(frozen=True)
class Config:
    """Slots of a split, and the warps of its program. Never by the batch: a row's sums would change
    with it."""

    block_s: int
    num_warps: int


def config(block_d: int, itemsize: int, matrix: bool) -> Config:
    """Some 32 kB of keys and values a program, in four programs or more a multiprocessor: its memory
    is then kept busy while some of them compute. Tensor cores want 64 slots."""
    row_bytes = block_d * max(2, itemsize)  # float8 is widened in registers
    block_s = max(64 if matrix else 1, min(128, 16384 // row_bytes))
    # With 4 warps these held twice as much a thread, and took up to four times the registers.
    wide_rows = not matrix and block_d <= 128 and row_bytes >= 256
    return Config(block_s, 8 if wide_rows else 4)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    q_code: Tensor | None,
    k_codes: Tensor | None,
    offset: int,
    scale: float,
    key_mask: Tensor | None,
    null_kv: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    window: int | None,
    counters: Tensor | None,
) -> Tensor:
    """`reference.decode_attention` in one kernel."""
    B, H, D = q.shape
    num_key_heads, S = k_cache.shape[1], k_cache.shape[2]
    check_caches(k_cache, v_cache)
    out = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group = H // num_key_heads
    # fp32 is not multiplied on tensor cores: there each query head reads its slots for itself.
    matrix = group > 1 and q.dtype != torch.float32
    heads = group if matrix else 1
    heads_2 = max(16, triton.next_power_of_2(heads)) if matrix else 1
    block_d = max(64 if matrix else 16, triton.next_power_of_2(D))
    cut = config(block_d, k_cache.itemsize, matrix)
    splits = max(1, triton.cdiv(S, cut.block_s))
    units = H // heads
    merged = 4096 if matrix else 2048  # elements of partial outputs at a time, in registers
    if counters is None:
        counters = torch.zeros(B * units, dtype=torch.int32, device=q.device)
    state = q.new_empty((B, units, splits, 2, heads_2), dtype=torch.float32)
    acc = q.new_empty((B, units, splits, heads_2, block_d), dtype=torch.float32)
    q = q if q.stride(2) == 1 else q.contiguous()
    table, null_kv = (None if x is None else x.contiguous() for x in (table, null_kv))
    k_codes, key_mask, k_scales, v_scales = (
        None if x is None else x if x.stride(-1) == 1 else x.contiguous()
        for x in (k_codes, key_mask, k_scales, v_scales)
    )
    attend[(B * units, splits)](
        q, k_cache, v_cache, lengths.contiguous(), table, q_code, k_codes, key_mask, null_kv, k_scales, v_scales,
        state, acc, counters, out, offset, scale, S if window is None else min(window, S), S,
        1 if table is None else table.shape[1], units,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        0 if q_code is None else q_code.stride(0),
        0 if k_codes is None or len(k_codes) == 1 else k_codes.stride(0),
        0 if key_mask is None else key_mask.stride(0),
        *((0, 0) if k_scales is None else k_scales.stride()[:2]),
        *((0, 0) if v_scales is None else v_scales.stride()[:2]),
        HEADS=heads, GROUP=group, D=D, BLOCK_S=cut.block_s, BLOCK_D=block_d, HEADS_2=heads_2,
        CHUNK=min(triton.next_power_of_2(splits), max(1, merged // (heads_2 * block_d))),
        MATRIX=matrix, num_warps=cut.num_warps, **dependent_launch(q),
    )  # fmt: skip
    return out


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    """Raises ValueError for what the kernels do not take."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape[3] > MAX_D:
            raise ValueError(f"{name} has width {cache.shape[3]}, wanted at most {MAX_D} on CUDA")
        if cache.stride(3) != 1 and cache.shape[3] > 1:
            raise ValueError(f"{name} has strides {cache.stride()}, wanted 1 at last on CUDA")
        check_float8(name, cache)
