"""A decoder's weights as a step reads them, and the step through its layers.

Whatever module the weights came from (`from_stage`, `interop`), they are put here side by side
in the order and in the precision in which a step streams them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from musiclm_engine.generation.cache import KVCache
from musiclm_engine.generation.ops import KERNELS, StepOps
from musiclm_kernels import HyperConnection


class Weight(NamedTuple):
    """values [N, K], float or of 8 bits; scale [N] float32 beside 8 bits."""

    values: Tensor
    scale: Tensor | None = None


class Norm(NamedTuple):
    """LayerNorm's: weight [D], bias [D] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """Attributes:
    norm: of the input.
    qkv: [(H + 2 Hkv) d, D], queries above keys above values.
    out: [D, H d].
    normalize_kv: keys and values are made of the normalised input, as queries always are.
    connection: to the residual streams, if there are several.
    """

    norm: Norm
    qkv: Weight
    out: Weight
    normalize_kv: bool = True
    connection: HyperConnection | None = None


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Attention to what does not grow, whose keys and values are made before the first step.

    Attributes:
        norm: of the input.
        q: [H d, D].
        out: [D, H d].
        null_kv: [2, Hkv, d], a key and value that are always attended, or None.
        connection: to the residual streams, if there are several.
    """

    norm: Norm
    q: Weight
    out: Weight
    null_kv: Tensor | None = None
    connection: HyperConnection | None = None


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Attributes:
    norm: of the input.
    up: [F, D], or [2 F, D] with geglu.
    down: [D, F].
    activation: "gelu" or "geglu".
    inner_norm: of what goes into `down`, or None.
    connection: to the residual streams, if there are several.
    """

    norm: Norm
    up: Weight
    down: Weight
    activation: str
    inner_norm: Norm | None = None
    connection: HyperConnection | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    attention: SelfAttention
    cross_attention: CrossAttention | None
    feed_forward: FeedForward


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Attributes:
    layers: in order.
    heads, key_heads, dim_head: H, Hkv, d of self-attention.
    streams: s, residual streams; 1 is a plain residual.
    mixed: hyper-connections write to the mixed streams, or to the streams as they were.
    value_residual: from the second layer on, values are averaged with the first layer's.
    table: [H, T] float32 bias, or None; offset: added to the difference of its codes.
    norm: of the last layer's output.
    head: [L, V, D] for the L levels of a frame; head_scale [L, V] beside 8 bits; head_bias [L, V].
    embedding: [L, V', D], the input that follows a token of each level.
    """

    layers: tuple[DecoderLayer, ...]
    heads: int
    key_heads: int
    dim_head: int
    streams: int = 1
    mixed: bool = True
    value_residual: bool = False
    table: Tensor | None = None
    offset: int = 0
    norm: Norm
    head: Tensor
    head_scale: Tensor | None = None
    head_bias: Tensor | None = None
    embedding: Tensor


class Memory(NamedTuple):
    """What cross-attention attends to: keys and values [layers, B, Hkv, M, d], mask [B, M] bool,
    lengths [B] int32, all of them M."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    lengths: Tensor


def step_layers(
    decoder: Decoder,
    x: Tensor,
    cache: KVCache,
    *,
    memory: Memory | None = None,
    q_code: Tensor | None = None,
    k_codes: Tensor | None = None,
    counters: Tensor | None = None,
    dtype: torch.dtype,
    ops: StepOps = KERNELS,
) -> None:
    """One more token a row through all layers, in place.

    Five launches a layer, and three more where it attends to a memory.

    Args:
        decoder: the weights.
        x: [B, D] float32 embeddings, or [B, s, D] over streams; the last layer's output afterwards.
        cache: written at `cache.positions`, attended up to `cache.lengths`.
        memory: for decoders with cross-attention.
        q_code: [B] int32 and k_codes [1 or B, S] int32: of decoder.table.
        counters: see `decode_attention`.
        dtype: of what goes from one part to the next.
        ops: the operations, or their definitions.
    """
    first_value = None
    for number, layer in enumerate(decoder.layers):
        attention = layer.attention
        k_cache, v_cache, k_scales, v_scales = cache.layers[number]
        q, value, mix = ops.decode_qkv(
            x, attention.qkv.values, k_cache, v_cache, cache.positions,
            weight_scale=attention.qkv.scale,
            norm_weight=attention.norm.weight, norm_bias=attention.norm.bias,
            normalize_kv=attention.normalize_kv, first_value=first_value,
            connection=attention.connection, k_scales=k_scales, v_scales=v_scales, dtype=dtype,
        )  # fmt: skip
        if decoder.value_residual and first_value is None:
            first_value = value
        attended = ops.decode_attention(
            q, k_cache, v_cache, cache.lengths,
            table=decoder.table, q_code=q_code, k_codes=k_codes, offset=decoder.offset,
            k_scales=k_scales, v_scales=v_scales, counters=counters,
        )  # fmt: skip
        ops.decode_residual(
            x, attended.flatten(1), attention.out.values, weight_scale=attention.out.scale,
            mix=mix, mixed=decoder.mixed,
        )  # fmt: skip
        if layer.cross_attention is not None and memory is not None:
            _attend_memory(decoder, layer.cross_attention, x, memory, number, counters, dtype, ops)
        feed_forward = layer.feed_forward
        h, mix = ops.decode_linear(
            x, feed_forward.up.values, weight_scale=feed_forward.up.scale,
            norm_weight=feed_forward.norm.weight, norm_bias=feed_forward.norm.bias,
            activation=feed_forward.activation, connection=feed_forward.connection, dtype=dtype,
        )  # fmt: skip
        inner = feed_forward.inner_norm
        ops.decode_residual(
            x, h, feed_forward.down.values, weight_scale=feed_forward.down.scale,
            norm_weight=None if inner is None else inner.weight,
            norm_bias=None if inner is None else inner.bias,
            mix=mix, mixed=decoder.mixed,
        )  # fmt: skip


def _attend_memory(
    decoder: Decoder,
    attention: CrossAttention,
    x: Tensor,
    memory: Memory,
    number: int,
    counters: Tensor | None,
    dtype: torch.dtype,
    ops: StepOps,
) -> None:
    keys, values = memory.keys[number], memory.values[number]
    q, mix = ops.decode_linear(
        x, attention.q.values, weight_scale=attention.q.scale,
        norm_weight=attention.norm.weight, norm_bias=attention.norm.bias,
        connection=attention.connection, dtype=dtype,
    )  # fmt: skip
    attended = ops.decode_attention(
        q.unflatten(1, (-1, keys.shape[3])), keys, values, memory.lengths,
        key_mask=memory.mask, null_kv=attention.null_kv, counters=counters,
    )  # fmt: skip
    ops.decode_residual(
        x, attended.flatten(1), attention.out.values, weight_scale=attention.out.scale,
        mix=mix, mixed=decoder.mixed,
    )  # fmt: skip
