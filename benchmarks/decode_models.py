"""The stages whose decode step is timed, with random weights: what a step costs does not depend on
what it computes.

"audiolm": audiolm-pytorch's semantic transformer, text-conditioned, as its constructor makes it:
multi-query attention, four residual streams. "paper": a decoder of AudioLM's size, 430 M parameters
at depth 24 and width 1024: pre-norm, a bias by distance, gated feed-forward of four times the width.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from musiclm_engine.generation.decoder import (
    Decoder,
    DecoderLayer,
    FeedForward,
    Norm,
    SelfAttention,
    Weight,
)
from musiclm_engine.interop.audiolm_pytorch import AudioLMStage, packed, stage_from_audiolm_pytorch

VOCABULARY = 1024
DIM_HEAD = 64
STREAMS = 4


def audiolm_state(dim: int, depth: int, heads: int, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of audiolm_pytorch.SemanticTransformer(audio_text_condition=True)."""
    generator = torch.Generator().manual_seed(seed)
    inner, hidden, size = heads * DIM_HEAD, int(dim * 8 / 3), VOCABULARY + 1
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 1.0, around: float = 0.0) -> None:
        state[name] = around + scale * torch.randn(shape, generator=generator)

    def add_weight(name: str, rows: int, columns: int) -> None:
        add(name, rows, columns, scale=columns**-0.5)

    def add_norm(name: str, width: int) -> None:
        add(f"{name}.gamma", width, scale=0.1, around=1.0)
        state[f"{name}.beta"] = torch.zeros(width)

    for layer in range(depth):
        for part in range(3):
            path = f"transformer.layers.{layer}.{part}"
            add(f"{path}.static_alpha", STREAMS, STREAMS + 1, scale=0.1)
            state[f"{path}.static_alpha"] += torch.eye(STREAMS, STREAMS + 1).roll(1, 1)
            state[f"{path}.static_alpha"][layer % STREAMS, 0] += 1.0
            add(f"{path}.static_beta", STREAMS, scale=0.1, around=1.0)
            add(f"{path}.dynamic_alpha_fn", dim, STREAMS + 1, scale=dim**-0.5)
            add(f"{path}.dynamic_beta_fn", dim, scale=dim**-0.5)
            for name in ("alpha", "beta"):
                state[f"{path}.dynamic_{name}_scale"] = torch.tensor(0.1)
            add(f"{path}.norm.gamma", dim, scale=0.1)
            if part == 2:
                add_norm(f"{path}.branch.0", dim)
                add_weight(f"{path}.branch.1.weight", 2 * hidden, dim)
                add_norm(f"{path}.branch.3", hidden)
                add_weight(f"{path}.branch.5.weight", dim, hidden)
                continue
            add_norm(f"{path}.branch.norm", dim)
            add_weight(f"{path}.branch.to_q.weight", inner, dim)
            add_weight(f"{path}.branch.to_kv.weight", 2 * DIM_HEAD, dim)
            add_weight(f"{path}.branch.to_out.0.weight", dim, inner)
            if part == 1:
                add(f"{path}.branch.null_kv", 2, 1, DIM_HEAD)
                add_norm(f"{path}.branch.context_norm", dim)
    for layer, (rows, columns) in enumerate([(dim // 2, 1), *[(dim // 2, dim // 2)] * 2]):
        add_weight(f"transformer.rel_pos_bias.net.{layer}.0.weight", rows, columns)
        add(f"transformer.rel_pos_bias.net.{layer}.0.bias", rows, scale=0.1)
    # Distances go in as they are, to hundreds: the first layer keeps what follows near 1.
    state["transformer.rel_pos_bias.net.0.0.weight"] /= 64
    add_weight("transformer.rel_pos_bias.net.3.weight", heads, dim // 2)
    add("transformer.rel_pos_bias.net.3.bias", heads)
    add_norm("transformer.norm", dim)
    add("start_token", dim)
    add("semantic_embedding.weight", size, dim)
    add_weight("to_logits.weight", size, dim)
    add("to_logits.bias", size, scale=0.1)
    return state


def audiolm_stage(
    state: dict[str, Tensor], length: int, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> AudioLMStage:
    return stage_from_audiolm_pytorch(state, length=length, dtype=dtype, weight_dtype=weight_dtype)


def paper_decoder(
    dim: int, depth: int, heads: int, length: int, device: torch.device, seed: int = 0
) -> Decoder:
    """In float32; the bias has an entry for each of `length` distances."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    def weight(rows: int, columns: int) -> Weight:
        return Weight(normal(rows, columns, scale=columns**-0.5))

    def norm() -> Norm:
        return Norm(1 + normal(dim, scale=0.1))

    inner = heads * DIM_HEAD
    layers = tuple(
        DecoderLayer(
            attention=SelfAttention(
                norm=norm(), qkv=weight(3 * inner, dim), out=weight(dim, inner)
            ),
            cross_attention=None,
            feed_forward=FeedForward(
                norm=norm(), up=weight(8 * dim, dim), down=weight(dim, 4 * dim), activation="geglu"
            ),
        )
        for _ in range(depth)
    )
    return Decoder(
        layers=layers,
        heads=heads,
        key_heads=heads,
        dim_head=DIM_HEAD,
        table=normal(heads, length, scale=1.0),
        norm=norm(),
        head=normal(1, VOCABULARY, dim, scale=dim**-0.5),
        embedding=normal(1, VOCABULARY, dim, scale=1.0),
    )


def mapped(node: Any, change: Callable[[Any], Any], kinds: type | tuple[type, ...]) -> Any:
    """`node`, dataclasses and tuples of them, with everything of these kinds changed."""
    if isinstance(node, kinds):
        return change(node)
    if is_dataclass(node) and not isinstance(node, type):
        return replace(
            node, **{f.name: mapped(getattr(node, f.name), change, kinds) for f in fields(node)}
        )
    if isinstance(node, tuple):
        parts = [mapped(part, change, kinds) for part in node]
        return tuple(parts) if type(node) is tuple else type(node)(*parts)
    return node


def narrowed(decoder: Decoder, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> Decoder:
    """A float32 decoder with its matrices in `dtype`, or in 8 bits."""

    def pack(weight: Weight) -> Weight:
        return packed(weight.values, dtype=dtype, weight_dtype=weight_dtype)

    head = pack(Weight(decoder.head.flatten(0, 1)))
    return replace(
        mapped(decoder, pack, Weight),
        head=head.values.view(decoder.head.shape),
        head_scale=None if head.scale is None else head.scale.view(decoder.head.shape[:2]),
    )


def in_float64(decoder: Decoder) -> Decoder:
    """The same values, those of 8 bits multiplied out."""

    def widened(weight: Weight) -> Weight:
        values = weight.values.double()
        return Weight(values if weight.scale is None else values * weight.scale.double()[:, None])

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    head = decoder.head.double()
    if decoder.head_scale is not None:
        head = head * decoder.head_scale.double()[..., None]
    wide = mapped(mapped(decoder, widened, Weight), double, Tensor)
    return replace(wide, head=head, head_scale=None)


def weight_bytes(decoder: Decoder) -> int:
    """What a step reads of the weights: every matrix once, of the head one level."""
    total = decoder.head[0].nbytes

    def count(weight: Weight) -> Weight:
        nonlocal total
        total += weight.values.numel() * weight.values.itemsize
        return weight

    mapped(decoder.layers, count, Weight)
    return total
