"""The parts of a layer by quick products and a quick append: the bodies on a CPU, and on a GPU of
many rows.

A step on a CPU is the time it takes to read the weights, so bfloat16 and int8 weights are
multiplied as they are, by bfloat16 activations, with fp32 sums.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.decode.reference import append_to_cache
from musiclm_kernels.decode_layer import composition_reference as composition
from musiclm_kernels.decode_layer import reference
from musiclm_kernels.decode_layer.composition_reference import HyperConnection

INT8_BLOCK = 32  # columns that aten's int8 product takes at a time; it reads past others
# Scales for that product, which knows bfloat16 ones only. Inductor wants them to outlive the call.
ONES = torch.ones(1 << 16, dtype=torch.bfloat16)


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
    y, mix = composition.decode_linear(
        x, weight,
        weight_scale=weight_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        activation=activation,
        connection=_joined(connection_weight, connection_scale, connection_static),
        dtype=dtype, product=quick_product,
    )  # fmt: skip
    return y, _mix_or_nothing(x, mix)


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
    q, v, mix = composition.decode_qkv(
        x, weight, k_cache, v_cache, positions,
        weight_scale=weight_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        normalize_kv=normalize_kv, q_gain=q_gain, k_gain=k_gain, first_value=first_value,
        connection=_joined(connection_weight, connection_scale, connection_static),
        k_scales=k_scales, v_scales=v_scales, dtype=dtype, product=quick_product,
        append=quick_append,
    )  # fmt: skip
    return q, v, _mix_or_nothing(x, mix)


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
    composition.decode_residual(
        x, h, weight,
        weight_scale=weight_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        mix=mix, mixed=mixed, product=quick_product,
    )  # fmt: skip


def quick_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """x @ weight.T, weight[n] times weight_scale[n] if it is given."""
    if weight.dtype == torch.float16 and x.is_cuda:  # on a CPU quicker as float32
        return F.linear(x.to(torch.float16), weight).to(x.dtype)
    if x.dtype == torch.float64 or weight.dtype in (torch.float32, torch.float64, torch.float16):
        return reference.exact_product(x, weight, weight_scale)
    rounded = x.to(torch.bfloat16)
    whole = None if x.is_cuda else _in_whole_blocks(weight)
    if whole is None:
        product = F.linear(rounded, weight.to(torch.bfloat16))
    else:
        rounded = F.pad(rounded, (0, whole.shape[1] - weight.shape[1]))
        product = torch._weight_int8pack_mm(rounded, whole, ONES[: len(whole)])
    product = product.to(x.dtype)
    return product if weight_scale is None else product * weight_scale


def quick_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """`append_to_cache` of one token: two copies where all rows are at the same place."""
    on_cpu = positions.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and k_scales is None and len(positions):
        first, last = (int(position) for position in positions.aminmax())
        if first == last and first >= 0:
            slot = first % k_cache.shape[2]
            k_cache[:, :, slot] = k[:, :, 0]
            v_cache[:, :, slot] = v[:, :, 0]
            return
    append_to_cache(k_cache, v_cache, k, v, positions, k_scales=k_scales, v_scales=v_scales)


def _in_whole_blocks(weight: Tensor) -> Tensor | None:
    """An int8 weight with its columns up to a whole block, where the gap after each row has them."""
    (N, K), width = weight.shape, weight.stride(0)
    takes = weight.dtype == torch.int8 and width % INT8_BLOCK == 0 and 0 <= width - K < INT8_BLOCK
    if takes and width > K and not torch.compiler.is_compiling():  # where it would be refused
        takes = weight.storage_offset() + N * width <= weight.untyped_storage().nbytes()
    return weight.as_strided((N, width), (width, 1)) if takes and N <= len(ONES) else None


def _joined(*parts: Tensor | None) -> HyperConnection | None:
    weight, scale, static = parts
    if weight is None or scale is None or static is None:
        return None
    return HyperConnection(weight, scale, static)


def _mix_or_nothing(x: Tensor, mix: Tensor | None) -> Tensor:
    return x.new_empty(0) if mix is None else mix
