"""The parts of a transformer layer for one token a row, in plain PyTorch, around a product and a way
into the cache that the caller chooses: exact ones make the definitions, quick ones the bodies.

Dimensions: B rows, D width, s residual streams, H query heads, Hkv key heads, d width of a head,
S slots of the cache, F width of the feed-forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.registry import inlines_on_cpu

NORM_EPSILON = 1e-5  # of LayerNorm
UNIT_EPSILON = 1e-12  # F.normalize's: the least length that is divided by

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class HyperConnection(NamedTuple):
    """How a sub-layer reads its input from s residual streams R and writes its output y to them.

        mix[b] = tanh(R[b] / |R[b]| @ weight.T) * scale + static        [s, s + 2]
        input  = sum_i mix[i, 0] R[i]
        R'[j]  = (sum_i mix[i, 1 + j] R[i], or R[j]) + mix[j, s + 1] y

    Attributes:
        weight: [s + 2, D] float32.
        scale: [s + 2] float32.
        static: [s, s + 2] float32.

    Source: Zhu et al., "Hyper-connections", arXiv 2409.19606, section 2.2, with an l2 norm.
    """

    weight: Tensor
    scale: Tensor
    static: Tensor


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
    product: Product,
) -> tuple[Tensor, Tensor | None]:
    """activation(weight @ LayerNorm(x)), and the mix of the connection."""
    x, mix = read_streams(x, connection)
    y = product(layer_norm(x, norm_weight, norm_bias), weight, weight_scale).to(x.dtype)
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "geglu":
        value, gate = y.chunk(2, dim=-1)
        y = value * F.gelu(gate)
    return y.to(dtype or output_dtype(x, weight)), mix


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
    product: Product,
    append: Callable[..., None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and values of this token, and the mix of the connection; its key and value go into
    the cache."""
    B = len(x)
    num_key_heads, d = k_cache.shape[1], k_cache.shape[3]
    key_rows = 2 * num_key_heads * d
    query_rows = len(weight) - key_rows
    x, mix = read_streams(x, connection)
    normed = layer_norm(x, norm_weight, norm_bias)
    if normalize_kv:
        qkv = product(normed, weight, weight_scale).to(x.dtype)
    else:
        q_scale, kv_scale = (
            (None, None)
            if weight_scale is None
            else (weight_scale[:query_rows], weight_scale[query_rows:])
        )
        parts = (
            product(normed, weight[:query_rows], q_scale),
            product(x, weight[query_rows:], kv_scale),
        )
        qkv = torch.cat(parts, dim=-1).to(x.dtype)
    q, k, v = (
        part.view(B, -1, d)
        for part in qkv.split([query_rows, key_rows // 2, key_rows // 2], dim=-1)
    )
    if q_gain is not None:
        q = F.normalize(q, dim=-1, eps=UNIT_EPSILON) * q_gain.to(q.dtype)
    if k_gain is not None:
        k = F.normalize(k, dim=-1, eps=UNIT_EPSILON) * k_gain.to(k.dtype)
    cached = v if first_value is None else 0.5 * (v + first_value.to(v.dtype))
    k, cached = k[:, :, None], cached[:, :, None]
    if k_scales is None:
        k, cached = k.to(k_cache.dtype), cached.to(v_cache.dtype)
    append(k_cache, v_cache, k, cached, positions, k_scales=k_scales, v_scales=v_scales)
    dtype = dtype or output_dtype(x, weight)
    return q.to(dtype), v.to(dtype), mix


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
    product: Product,
) -> None:
    """x += weight @ LayerNorm(h), in place; over streams as `HyperConnection` says."""
    y = product(layer_norm(h.to(x.dtype), norm_weight, norm_bias), weight, weight_scale)
    y = y.to(x.dtype)
    if mix is None:
        x += y
        return
    streams = mix[:, :, 1:-1].mT @ x if mixed else x
    x.copy_(streams + mix[:, :, -1:] * y[:, None])


def read_streams(x: Tensor, connection: HyperConnection | None) -> tuple[Tensor, Tensor | None]:
    """A sub-layer's input [B, D], and the mix [B, s, s + 2] if x is streams."""
    if connection is None:
        return x, None
    weight, scale, static = (part.to(x.dtype) for part in connection)
    unit = F.normalize(x, dim=-1, eps=UNIT_EPSILON)
    if inlines_on_cpu(x):  # so few columns join the norm's loop, where a product has one of its own
        scores = (unit[:, :, None] * weight).sum(-1)
    else:
        scores = unit @ weight.T
    mix = torch.tanh(scores) * scale + static
    return (mix[:, None, :, 0] @ x)[:, 0], mix


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias, eps=NORM_EPSILON)


def output_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a part gives out if nothing else is asked for: the weights', or x's beside 8 bits."""
    return weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else x.dtype
