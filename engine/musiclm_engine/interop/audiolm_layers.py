"""The layers of an audiolm-pytorch 2.4.0 transformer, as a decode step reads them.

Read from a state dict alone: every size follows from the shapes. Layers before 2.4.0 have no
hyper-connections, and no `branch.` in their names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from musiclm_engine.generation.decoder import (
    CrossAttention,
    DecoderLayer,
    FeedForward,
    Norm,
    SelfAttention,
    Weight,
)
from musiclm_engine.interop.entries import Entries
from musiclm_kernels import HyperConnection

Pack = Callable[[Tensor], Weight]


@dataclass(frozen=True)
class ContextProjection:
    """Keys and values of what a layer's cross-attention attends to.

    Attributes:
        norm: of the context.
        weight: [2 d, C], keys above values.
    """

    norm: Norm
    weight: Tensor


@dataclass(frozen=True)
class Layers:
    """All layers of a transformer.

    Attributes:
        layers: in order.
        contexts: one for each layer, or none without cross-attention.
        heads, dim_head: of all attention; keys and values have one head.
        streams: residual streams.
    """

    layers: tuple[DecoderLayer, ...]
    contexts: tuple[ContextProjection, ...]
    heads: int
    dim_head: int
    streams: int


def read_layers(entries: Entries, pack: Pack, dtype: torch.dtype) -> Layers:
    """What `entries`, those of a transformer's `layers`, say.

    Args:
        pack: makes of a weight [N, K] what a step streams.
        dtype: of keys and values.

    Raises:
        ValueError: an entry is missing.
    """
    depth = len({name.split(".")[0] for name in entries.names()})
    if depth == 0:
        raise ValueError("state has no transformer.layers")
    layers, contexts = [], []
    for number in range(depth):
        layer = entries.below(f"{number}.")
        attention, key_rows = _self_attention(layer.below("0."), pack)
        cross_attention = None
        if layer.below("1.").names():
            cross_attention, context = _cross_attention(layer.below("1."), pack, dtype)
            contexts.append(context)
        feed_forward = _feed_forward(layer.below("2."), pack)
        layers.append(
            DecoderLayer(
                attention=attention, cross_attention=cross_attention, feed_forward=feed_forward
            )
        )
    if len(contexts) not in (0, depth):
        raise ValueError(
            f"{len(contexts)} of {depth} layers have cross-attention; want all or none"
        )
    connection = layers[0].attention.connection
    dim_head = key_rows // 2
    return Layers(
        layers=tuple(layers),
        contexts=tuple(contexts),
        heads=len(layers[0].attention.qkv.values) // dim_head - 2,
        dim_head=dim_head,
        streams=1 if connection is None else len(connection.static),
    )


def read_norm(entries: Entries) -> Norm:
    """Its `beta` is a buffer of zeros: no bias."""
    bias = entries.take("beta").float()
    return Norm(entries.take("gamma").float(), bias if bias.any() else None)


def _self_attention(entries: Entries, pack: Pack) -> tuple[SelfAttention, int]:
    """And the rows of its `to_kv`."""
    connection, branch = _connection(entries)
    kv = branch.take("to_kv.weight")
    attention = SelfAttention(
        norm=read_norm(branch.below("norm.")),
        qkv=pack(torch.cat((branch.take("to_q.weight"), kv))),
        out=pack(branch.take("to_out.0.weight")),
        normalize_kv=False,
        connection=connection,
    )
    return attention, len(kv)


def _cross_attention(
    entries: Entries, pack: Pack, dtype: torch.dtype
) -> tuple[CrossAttention, ContextProjection]:
    connection, branch = _connection(entries)
    attention = CrossAttention(
        norm=read_norm(branch.below("norm.")),
        q=pack(branch.take("to_q.weight")),
        out=pack(branch.take("to_out.0.weight")),
        null_kv=branch.take("null_kv").to(dtype),
        connection=connection,
    )
    context_norm = read_norm(branch.below("context_norm."))
    return attention, ContextProjection(context_norm, branch.take("to_kv.weight").float())


def _feed_forward(entries: Entries, pack: Pack) -> FeedForward:
    connection, branch = _connection(entries)
    return FeedForward(
        norm=read_norm(branch.below("0.")),
        up=pack(branch.take("1.weight")),
        down=pack(branch.take("5.weight")),
        activation="geglu",
        inner_norm=read_norm(branch.below("3.")),
        connection=connection,
    )


def _connection(entries: Entries) -> tuple[HyperConnection | None, Entries]:
    """A sub-layer's hyper-connection, if it has one, and its branch."""
    names = entries.names()
    branch = entries.below("branch.") if any(n.startswith("branch.") for n in names) else entries
    if "static_alpha" not in names:
        return None, branch
    alpha, beta = entries.take("static_alpha").float(), entries.take("static_beta").float()
    alpha_weight = entries.take("dynamic_alpha_fn").float()
    beta_weight = entries.take("dynamic_beta_fn").float()
    gain = len(alpha_weight) ** 0.5 * (entries.take("norm.gamma").float() + 1)
    alpha_scale = entries.take("dynamic_alpha_scale").float()
    beta_scale = entries.take("dynamic_beta_scale").float()
    connection = HyperConnection(
        weight=(gain[:, None] * torch.cat((alpha_weight, beta_weight[:, None]), 1)).T.contiguous(),
        scale=torch.cat((alpha_scale.expand(alpha.shape[1]), beta_scale[None])),
        static=torch.cat((alpha, beta[:, None]), 1),
    )
    return connection, branch
