"""The launchers: which kernel, in which blocks, and what runs before it.

Up to 4 rows a program holds its weights and takes the rows one by one, each alike, in float32. Up to
16 rows the tensor cores take all at once; so do fewer rows where a program has to cover a whole head, or
wide streams, which no registers hold. Either is one launch; only streams taken at once are read by a
launch before it. Beyond that PyTorch's own products are good.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from musiclm_kernels.decode_layer import plain
from musiclm_kernels.decode_layer.composition_reference import NORM_EPSILON, UNIT_EPSILON
from musiclm_kernels.decode_layer.linear_kernel import linear_kernel
from musiclm_kernels.decode_layer.prepare_kernel import prepare_kernel
from musiclm_kernels.decode_layer.qkv_kernel import qkv_kernel
from musiclm_kernels.decode_layer.residual_kernel import residual_kernel
from musiclm_kernels.target import check_float8, dependent_launch

MAX_SINGLE_ROWS = 4
MAX_ROWS = 16  # of the tensor cores' smallest tile
MAX_STREAM_ELEMENTS = 4096  # of a row's streams, in registers beside a slab; with more it spilled
MAX_K = 8192  # a row must fit the registers of one program

# A program that takes one row at a time holds a slab of 32 kB or less in bf16, of which a thread has 64
# elements, as float32 in as many registers.
SLAB_PER_WARP = 2048
# Tiles of the tensor cores: a row is 512 bytes of 16-bit weights. Where x is float32 half of that:
# wider ones would not fit the 99 kB of shared memory that smaller GPUs have.
TILE_K = 256
WIDE_TILE_K = 128
HEAD_TILE = 8192  # elements of a tile that covers a head
PRODUCT_OF_8_BITS = torch.bfloat16  # which holds all of their values


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut, and Triton's launch options."""

    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def single_row_blocks(K: int, slabs: int = 1) -> Blocks:
    """For one row at a time; `slabs` is how many a program holds."""
    block_k = max(triton.next_power_of_2(K), 32)
    num_warps = 4 if block_k <= 2048 else 8
    block_n = min(max(num_warps * SLAB_PER_WARP // block_k // slabs, 1), 8)
    return Blocks(1, block_n, block_k, num_warps)


def all_rows_blocks(N: int, K: int, dtype: torch.dtype, slabs: int = 1, *, wide: bool) -> Blocks:
    """For all rows at once: enough programs for most multiprocessors of a large GPU. Fewer and
    wider ones where x is `wide`: read twice for its norm, or not of the product's type."""
    if dtype == torch.float32:  # on the ordinary cores
        return Blocks(MAX_ROWS, 8, 32, 4)
    padded = max(triton.next_power_of_2(K), 32)
    if wide:
        block_n = 8 if N <= 1024 else 16 if N <= 2048 else 32
        return Blocks(MAX_ROWS, block_n, min(WIDE_TILE_K, padded), 4 * slabs, 4)
    tile_k = min(TILE_K, padded)
    if N <= 2048:
        return Blocks(MAX_ROWS, 8, tile_k, slabs, 6)
    return Blocks(MAX_ROWS, 16, tile_k, 2 * slabs, 4)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    connection_weight: Tensor | None,
    connection_scale: Tensor | None,
    connection_static: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op's body on CUDA: see op.py."""
    B, K = len(x), x.shape[-1]
    if not runs_here(B, K):
        return plain.decode_linear(
            x, weight, weight_scale, norm_weight, norm_bias, activation,
            connection_weight, connection_scale, connection_static, dtype,
        )  # fmt: skip
    check_float8("weight", weight)
    N = len(weight) // 2 if activation == "geglu" else len(weight)
    x, norm = in_place_or_copied(x), (norm_weight, norm_bias)
    connection = (connection_weight, connection_scale, connection_static)
    num_streams = x.shape[1] if x.dim() == 3 else 0
    y, mix = x.new_empty(B, N, dtype=dtype), empty_mix(x)
    slabs = 2 if activation == "geglu" else 1
    if takes_rows_singly(x):
        blocks = single_row_blocks(K, slabs)
    else:
        blocks = all_rows_blocks(
            N, K, product_dtype(weight), slabs, wide=is_wide(x, weight, norm_weight)
        )
        if num_streams:
            x = prepare(x, connection, mix)
            connection, num_streams = (None, None, None), 0
    programs = max(triton.cdiv(N, blocks.block_n), num_streams + 2 if num_streams else 1)
    if B:
        linear_kernel[(programs,)](
            x, weight, weight_scale, *norm, *connection, mix, y, B, x.stride(0), weight.stride(0),
            N=N, K=K, ACTIVATION=activation, NUM_STREAMS=num_streams,
            NORM_EPSILON=NORM_EPSILON, UNIT_EPSILON=UNIT_EPSILON,
            PRODUCT=product_type(weight), **blocks.options, **dependent_launch(x),
        )  # fmt: skip
    return y, mix


def decode_qkv(
    x: Tensor,
    weight: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    weight_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    normalize_kv: bool,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    first_value: Tensor | None,
    connection_weight: Tensor | None,
    connection_scale: Tensor | None,
    connection_static: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's body on CUDA: see op.py."""
    B, K = len(x), x.shape[-1]
    _, Hkv, S, D = k_cache.shape
    if not runs_here(B, K):
        q, v, mix = plain.decode_qkv(
            x, weight, k_cache, v_cache, positions, weight_scale, norm_weight, norm_bias,
            normalize_kv, q_gain, k_gain, first_value,
            connection_weight, connection_scale, connection_static, k_scales, v_scales, dtype,
        )  # fmt: skip
        return q.contiguous(), v.contiguous(), mix  # of one product, and results share nothing
    check_float8("weight", weight)
    check_float8("k_cache", k_cache)
    H = len(weight) // D - 2 * Hkv
    x, norm = in_place_or_copied(x), (norm_weight, norm_bias)
    connection = (connection_weight, connection_scale, connection_static)
    q_gain, k_gain, first_value = contiguous(q_gain, k_gain, first_value)
    positions = positions.contiguous()
    num_streams = x.shape[1] if x.dim() == 3 else 0
    q, v = x.new_empty(B, H, D, dtype=dtype), x.new_empty(B, Hkv, D, dtype=dtype)
    mix = empty_mix(x)
    whole_heads = q_gain is not None or k_gain is not None or k_scales is not None
    if takes_rows_singly(x) and not whole_heads:
        blocks = single_row_blocks(K)
    else:
        blocks = all_rows_blocks(
            len(weight), K, product_dtype(weight), wide=is_wide(x, weight, norm_weight)
        )
        if whole_heads:
            block_n = max(triton.next_power_of_2(D), blocks.block_n)
            block_k = min(blocks.block_k, HEAD_TILE // block_n)
            blocks = Blocks(MAX_ROWS, block_n, block_k, 8, blocks.num_stages)
        if num_streams:
            x = prepare(x, connection, mix)
            connection, num_streams = (None, None, None), 0
    programs = (H + 2 * Hkv) * triton.cdiv(D, blocks.block_n)
    if num_streams:
        programs = max(programs, num_streams + 2)
    scale_strides = (0, 0, 0) if k_scales is None else k_scales.stride()
    if B:
        qkv_kernel[(programs,)](
            x, weight, weight_scale, *norm, *connection, mix, q, v, k_cache, v_cache,
            k_scales, v_scales, positions, q_gain, k_gain, first_value,
            B, S, x.stride(0), weight.stride(0),
            *head_strides(q_gain, k_gain),
            *k_cache.stride()[:3], *v_cache.stride()[:3], *scale_strides,
            H=H, Hkv=Hkv, D=D, K=K, NORMALIZE_KV=normalize_kv, NUM_STREAMS=num_streams,
            NORM_EPSILON=NORM_EPSILON, UNIT_EPSILON=UNIT_EPSILON,
            PRODUCT=product_type(weight), **blocks.options, **dependent_launch(x),
        )  # fmt: skip
    return q, v, mix


def decode_residual(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mix: Tensor | None,
    mixed: bool,
) -> None:
    """The op's body on CUDA: see op.py."""
    B, (N, K) = len(x), weight.shape
    if not runs_here(B, K):
        return plain.decode_residual(x, h, weight, weight_scale, norm_weight, norm_bias, mix, mixed)
    check_float8("weight", weight)
    h, norm = in_place_or_copied(h), (norm_weight, norm_bias)
    (mix,) = contiguous(mix)
    num_streams = x.shape[1] if x.dim() == 3 else 0
    if B <= MAX_SINGLE_ROWS:
        # A norm of wide rows takes registers too, as many as half a slab.
        blocks = single_row_blocks(K, 2 if norm_weight is not None and K > 2048 else 1)
    else:
        blocks = all_rows_blocks(N, K, product_dtype(weight), wide=is_wide(h, weight, norm_weight))
    if B:
        residual_kernel[(triton.cdiv(N, blocks.block_n),)](
            x, h, weight, weight_scale, *norm, mix, B, h.stride(0), weight.stride(0),
            N=N, K=K, NUM_STREAMS=num_streams, MIXED=mixed, NORM_EPSILON=NORM_EPSILON,
            PRODUCT=product_type(weight), **blocks.options, **dependent_launch(x),
        )  # fmt: skip


def prepare(x: Tensor, connection: tuple[Tensor | None, ...], mix: Tensor) -> Tensor:
    """[B, K] float32: what a sub-layer reads from streams. Writes the mix."""
    B, num_streams, K = x.shape
    out = x.new_empty(B, K)
    prepare_kernel[(B,)](
        x, *connection, mix, out,
        K=K, NUM_STREAMS=num_streams, BLOCK_K=max(triton.next_power_of_2(K), 32),
        UNIT_EPSILON=UNIT_EPSILON, num_warps=8, **dependent_launch(x),
    )  # fmt: skip
    return out


def runs_here(B: int, K: int) -> bool:
    """Whether a kernel takes so many rows of such a width; PyTorch's operations take the others."""
    return B <= MAX_ROWS and K <= MAX_K


def takes_rows_singly(x: Tensor) -> bool:
    """Few rows, whose streams, if they are such, fit the registers."""
    fits = x.dim() == 2 or x.shape[1] * x.shape[2] <= MAX_STREAM_ELEMENTS
    return len(x) <= MAX_SINGLE_ROWS and fits


def product_dtype(weight: Tensor) -> torch.dtype:
    """What the tensor cores multiply: the weight's type, or one for 8 bits."""
    return PRODUCT_OF_8_BITS if weight.itemsize == 1 else weight.dtype


def is_wide(x: Tensor, weight: Tensor, norm_weight: Tensor | None) -> bool:
    """Whether a product's input takes more of a program than its own type would."""
    return norm_weight is not None or x.dtype != product_dtype(weight)


def product_type(weight: Tensor) -> tl.dtype:
    return getattr(tl, str(product_dtype(weight)).removeprefix("torch."))


def empty_mix(x: Tensor) -> Tensor:
    return x.new_empty(0) if x.dim() == 2 else x.new_empty(*x.shape[:2], x.shape[1] + 2)


def in_place_or_copied(x: Tensor) -> Tensor:
    """Packed, from a multiple of 16 bytes on: Triton adds up rows that begin elsewhere in another
    order, and a row of a batch is to have the bits that it has alone."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def head_strides(*gains: Tensor | None) -> tuple[int, ...]:
    """From one head's gain to the next: 0 where the heads share one."""
    return tuple(0 if gain is None or gain.dim() == 1 else gain.stride(0) for gain in gains)
