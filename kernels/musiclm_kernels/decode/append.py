"""Writing into the cache in Triton: a program writes BLOCK_N new tokens of one row and one key head,
keys and values; each is read once and written once, or, into float8, made smaller on the way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.decode.launch import check_caches
from musiclm_kernels.decode.reference import FLOAT8_MAX
from musiclm_kernels.target import dependent_launch

BLOCK_N = 16  # tokens of a program where there are several: 4 kB of each tensor in bf16 at D 128
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def append_to_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """`reference.append_to_cache` in one kernel."""
    B, num_key_heads, N, D = k.shape
    check_caches(k_cache, v_cache)
    if k.numel() == 0:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    block_n = min(BLOCK_N, triton.next_power_of_2(N))
    _append[(B * num_key_heads, triton.cdiv(N, block_n))](
        k_cache, v_cache, k, v, positions, k_scales, v_scales, num_key_heads, N, k_cache.shape[2],
        positions.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *((0, 0, 0) if k_scales is None else k_scales.stride()),
        *((0, 0, 0) if v_scales is None else v_scales.stride()),
        D=D, BLOCK_N=block_n, BLOCK_D=max(16, triton.next_power_of_2(D)),
        FLOAT8_MAX=FLOAT8_MAX, SMALLEST_SCALE=SMALLEST_SCALE, num_warps=1 if block_n == 1 else 4,
        **dependent_launch(k),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_key_heads", "N", "S"])
def _append(
    k_cache_ptr,  # [B, Hkv, S, D]
    v_cache_ptr,  # [B, Hkv, S, D]
    k_ptr,  # [B, Hkv, N, D]
    v_ptr,  # [B, Hkv, N, D]
    positions_ptr,  # [B]
    k_scale_ptr,  # [B, Hkv, S] or None
    v_scale_ptr,  # [B, Hkv, S]
    num_key_heads,
    N,
    S,
    stride_position,
    stride_kcb,
    stride_kch,
    stride_kcs,
    stride_vcb,
    stride_vch,
    stride_vcs,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_k_scale_b,
    stride_k_scale_h,
    stride_k_scale_s,
    stride_v_scale_b,
    stride_v_scale_h,
    stride_v_scale_s,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FLOAT8_MAX: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = (tl.program_id(0) // num_key_heads).to(tl.int64)
    head = (tl.program_id(0) % num_key_heads).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(positions_ptr + b * stride_position).to(tl.int64)
    if position >= 0:
        slot = (position + token) % S
        _write_rows(
            k_ptr + b * stride_kb + head * stride_kh, stride_kn,
            k_cache_ptr + b * stride_kcb + head * stride_kch, stride_kcs,
            None if k_scale_ptr is None
            else k_scale_ptr + b * stride_k_scale_b + head * stride_k_scale_h, stride_k_scale_s,
            token, slot, N, D, BLOCK_D, FLOAT8_MAX, SMALLEST_SCALE,
        )  # fmt: skip
        _write_rows(
            v_ptr + b * stride_vb + head * stride_vh, stride_vn,
            v_cache_ptr + b * stride_vcb + head * stride_vch, stride_vcs,
            None if v_scale_ptr is None
            else v_scale_ptr + b * stride_v_scale_b + head * stride_v_scale_h, stride_v_scale_s,
            token, slot, N, D, BLOCK_D, FLOAT8_MAX, SMALLEST_SCALE,
        )  # fmt: skip


@triton.jit
def _write_rows(
    x_ptr, stride_x, cache_ptr, stride_cache, scale_ptr, stride_scale, token, slot, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FLOAT8_MAX: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
):  # fmt: skip
    """Of one head: rows `token` of x into rows `slot` of the cache, and their scales, if any."""
    d = tl.arange(0, BLOCK_D)
    inside = (token < N)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + token[:, None] * stride_x + d[None, :], mask=inside, other=0.0)
    if scale_ptr is not None:
        x = x.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(x), 1), FLOAT8_MAX)
        scale = tl.where(scale >= SMALLEST_SCALE, scale, 1.0)
        x = tl.div_rn(x, scale[:, None])
        tl.store(scale_ptr + slot * stride_scale, scale, mask=token < N)
    cache_ptr += slot[:, None] * stride_cache + d[None, :]
    tl.store(cache_ptr, x.to(cache_ptr.dtype.element_ty), mask=inside)
