"""The parts of a transformer layer for one token a row, by exact products: the definitions.

Dimensions: B rows, D width, s residual streams, H query heads, Hkv key heads, d width of a head,
S slots of the cache, F width of the feed-forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.decode.reference import append_to_cache
from musiclm_kernels.decode_layer import composition_reference as composition
from musiclm_kernels.decode_layer.composition_reference import HyperConnection


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "none",
    connection: HyperConnection | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """activation(weight @ LayerNorm(x)), and the mix of the connection."""
    return composition.decode_linear(
        x, weight,
        weight_scale=weight_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        activation=activation, connection=connection, dtype=dtype, product=exact_product,
    )  # fmt: skip


def decode_qkv(
    x: Tensor,
    weight: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    weight_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalize_kv: bool = True,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    first_value: Tensor | None = None,
    connection: HyperConnection | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and values of this token, and the mix of the connection; its key and value go into
    the cache."""
    return composition.decode_qkv(
        x, weight, k_cache, v_cache, positions,
        weight_scale=weight_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        normalize_kv=normalize_kv, q_gain=q_gain, k_gain=k_gain, first_value=first_value,
        connection=connection, k_scales=k_scales, v_scales=v_scales, dtype=dtype,
        product=exact_product, append=append_to_cache,
    )  # fmt: skip


def decode_residual(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mix: Tensor | None = None,
    mixed: bool = True,
) -> None:
    """x += weight @ LayerNorm(h), in place; over streams as `HyperConnection` says."""
    composition.decode_residual(
        x, h, weight,
        weight_scale=weight_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        mix=mix, mixed=mixed, product=exact_product,
    )  # fmt: skip


def exact_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """x @ weight.T in x's precision, weight[n] times weight_scale[n] if it is given."""
    product = F.linear(x, weight.to(x.dtype))
    return product if weight_scale is None else product * weight_scale.to(x.dtype)
