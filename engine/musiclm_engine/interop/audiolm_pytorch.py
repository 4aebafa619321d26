"""The semantic, coarse and fine transformers of audiolm-pytorch 2.4.0, through our decode step.

Their sequences are [start, context tokens, start, target tokens]: coarse tokens after semantic
ones, fine tokens after coarse ones; a semantic stage has the second half alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_engine.generation.decoder import Decoder, Memory, Weight, step_layers
from musiclm_engine.generation.step import DecodeStep
from musiclm_engine.interop.audiolm_bias import (
    GridBias,
    LineBias,
    read_grid_bias,
    read_line_bias,
)
from musiclm_engine.interop.audiolm_layers import ContextProjection, read_layers, read_norm
from musiclm_engine.interop.entries import Entries
from musiclm_kernels import quantize_weight

# What a checkpoint of a whole trainer holds beside the weights
CHECKPOINT_WEIGHTS = "model"
COLUMNS = 32  # 64 bytes of bfloat16; and what the product of 8 bits takes at a time on a CPU


@dataclass(frozen=True, kw_only=True)
class AudioLMStage:
    """A stage of audiolm-pytorch, for the decode step.

    Attributes:
        decoder: the weights of a step.
        bias: what `codes` come from, None without a position bias.
        target_start: [D], the input before the first target token.
        context_start: [D] and context_embedding [Lc, Vc, D], of a stage with a context, else None.
        text_projection: [D, C] of a text embedding's, None where C is D.
        contexts: for each layer, how text becomes keys and values; none without conditioning.
        dtype: of the memory's keys and values.
    """

    decoder: Decoder
    bias: LineBias | GridBias | None
    target_start: Tensor
    context_start: Tensor | None = None
    context_embedding: Tensor | None = None
    text_projection: Tensor | None = None
    contexts: tuple[ContextProjection, ...] = ()
    dtype: torch.dtype = torch.float32

    def prompt(self, context: Tensor | None, target: Tensor) -> Tensor:
        """The inputs before the first token to be sampled.

        Args:
            context: [B, Nc] tokens, frame by frame, or None for a stage without a context.
            target: [B, N] tokens that are given, N >= 0; frame by frame.

        Returns:
            [B, 1 + N, D], or [B, 2 + Nc + N, D] with a context; float32.

        Raises:
            ValueError: a context is missing or not wanted, or a token is not one of its level.
        """
        if (context is None) != (self.context_embedding is None):
            raise ValueError(
                f"context is {'missing' if context is None else 'given'}, "
                f"this stage has {'none' if self.context_embedding is None else 'one'}"
            )
        B = len(target)
        parts = [
            self.target_start.expand(B, 1, -1),
            _embed("target", target, self.decoder.embedding),
        ]
        if context is not None and self.context_embedding is not None:
            assert self.context_start is not None
            parts = [
                self.context_start.expand(B, 1, -1),
                _embed("context", context, self.context_embedding),
                *parts,
            ]
        return torch.cat(parts, 1)

    def codes(self, context_length: int, length: int) -> tuple[Tensor, Tensor] | None:
        """int32 [length] each, what tokens are to the bias table as queries and as keys; None
        without one.

        Args:
            context_length: context tokens, Nc of `prompt`; 0 without a context.
            length: of the whole sequence, start tokens included.

        Raises:
            ValueError: the table is of fewer tokens, or of other frames.
        """
        return None if self.bias is None else self.bias.codes(context_length, length)

    @torch.inference_mode()
    def begin(
        self, step: DecodeStep, context: Tensor | None, target: Tensor, *, seeds: Tensor
    ) -> None:
        """Let `step` take in a prompt, token by token; its next call draws what follows.

        Args:
            step: of `decoder`, its length the one that `codes` is to be asked for.
            context, target: see `prompt`. With guidance both of a row's twins are given them.
            seeds: [B] int64.

        Raises:
            ValueError: they are not of the step's rows, or are more tokens than it or its cache
                holds; see also `prompt` and `codes`.
        """
        B = len(step.buffers.seeds)
        for name, tokens in (("target", target), ("context", context)):
            if tokens is not None and len(tokens) != B:
                raise ValueError(f"{name} is of {len(tokens)} rows, wanted {B}, the step's")
        x = self.prompt(context, target)
        most = min(step.length, step.cache.slots)
        if x.shape[1] > most:
            raise ValueError(
                f"target makes a prompt of {x.shape[1]} tokens, wanted at most {most}: the step's "
                f"length is {step.length}, its cache has {step.cache.slots} slots"
            )
        x = x.repeat(len(step.buffers.x) // len(x), 1, 1)
        if self.decoder.streams > 1:
            x = x[:, :, None].repeat(1, 1, self.decoder.streams, 1)
        codes = self.codes(0 if context is None else context.shape[1], step.length)
        q_codes, k_codes = codes or (None, None)
        memory, dtype = step.buffers.memory, step.dtype
        for place in range(x.shape[1] - 1):
            positions = torch.full((len(x),), place, dtype=torch.int32, device=x.device)
            step_layers(
                self.decoder, x[:, place].contiguous(),
                replace(step.cache, positions=positions, lengths=positions + 1), memory=memory,
                q_code=None if q_codes is None else q_codes[place].expand(len(x)).contiguous(),
                k_codes=None if k_codes is None else k_codes[None, : step.cache.slots],
                dtype=dtype,
            )  # fmt: skip
        step.begin(
            x[:, -1], seeds=seeds, position=x.shape[1] - 1, number=target.shape[1],
            query_codes=None if q_codes is None else q_codes[None],
            key_codes=None if k_codes is None else k_codes[None],
        )  # fmt: skip

    def memory(self, text: Tensor, mask: Tensor | None = None) -> Memory:
        """What cross-attention attends to.

        Args:
            text: [B, M, C] embeddings.
            mask: [B, M] bool, True where there is text; where an embedding is not all zero if
                None. A row of False is one without conditioning: it attends to the null key.

        Raises:
            ValueError: the stage has no conditioning.
        """
        if not self.contexts:
            raise ValueError("text is given to a stage without conditioning")
        if mask is None:
            mask = (text != 0).any(-1)
        text = text.float()
        if self.text_projection is not None:
            text = F.linear(text, self.text_projection)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for context in self.contexts:
            gamma, beta = context.norm
            normed = F.layer_norm(text, text.shape[-1:], gamma, beta)
            k, v = F.linear(normed, context.weight).chunk(2, dim=-1)
            averaged = self.decoder.value_residual and values
            keys.append(k)
            values.append(0.5 * (v + values[0]) if averaged else v)
        return Memory(
            keys=torch.stack(keys)[:, :, None].to(self.dtype),
            values=torch.stack(values)[:, :, None].to(self.dtype),
            mask=mask,
            lengths=torch.full((len(text),), text.shape[1], dtype=torch.int32, device=text.device),
        )


def stage_from_audiolm_pytorch(
    source: nn.Module | Mapping[str, Any],
    *,
    length: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    hyper_connections: str = "unmixed",
    value_residual: bool = True,
) -> AudioLMStage:
    """A SemanticTransformer, CoarseTransformer or FineTransformer, for the decode step.

    Which of them it is, and all sizes, follow from the names and shapes of the weights.

    Args:
        source: the module, its state dict, or a checkpoint of its trainer.
        length: the most tokens of a sequence, context and start tokens included; of a fine stage
            the frames of its context, exactly: the bias depends on them. The bias table's size.
        dtype: of keys, values, and weights that are not of 8 bits.
        weight_dtype: torch.int8 or torch.float8_e4m3fn for the layers' weights and the head.
        hyper_connections: "unmixed" is what the package hyper-connections computes before its
            release 0.3.10 of 2026-01, with which older checkpoints were trained; "mixed" what it
            computes since. Names and shapes are the same, results are not.
        value_residual: False for checkpoints of audiolm-pytorch before 2.2.0, and for transformers
            made with add_value_residual=False.

    Raises:
        ValueError: an entry is missing or unknown, or `hyper_connections` is none of the two.

    Conditioning is cross-attention to text; transformers made with cond_as_self_attn_prefix have the
    names of those without conditioning, and run without it here.
    """
    if hyper_connections not in ("unmixed", "mixed"):
        raise ValueError(f"hyper_connections={hyper_connections!r}; want 'unmixed' or 'mixed'")
    if length < 1:
        raise ValueError(f"length={length}; want at least 1")
    state = source.state_dict() if isinstance(source, nn.Module) else source
    entries = Entries(state.get(CHECKPOINT_WEIGHTS, state))
    pack = partial(packed, dtype=dtype, weight_dtype=weight_dtype)
    layers = read_layers(entries.below("transformer.layers."), pack, dtype)
    ends = _read_ends(entries, length)
    text_projection = entries.take_if_there("proj_text_embed.weight")
    head = pack(ends.head.flatten(0, 1))
    decoder = Decoder(
        layers=layers.layers,
        heads=layers.heads,
        key_heads=1,
        dim_head=layers.dim_head,
        streams=layers.streams,
        mixed=hyper_connections == "mixed",
        value_residual=value_residual,
        table=None if ends.bias is None else ends.bias.table,
        offset=0 if ends.bias is None else ends.bias.offset,
        norm=read_norm(entries.below("transformer.norm.")),
        head=head.values.view(ends.head.shape),
        head_scale=None if head.scale is None else head.scale.view(ends.head.shape[:2]),
        head_bias=ends.head_bias,
        embedding=ends.embedding,
    )
    entries.check_all_taken()
    return AudioLMStage(
        decoder=decoder,
        bias=ends.bias,
        target_start=ends.target_start,
        context_start=ends.context_start,
        context_embedding=ends.context_embedding,
        text_projection=None if text_projection is None else text_projection.float(),
        contexts=layers.contexts,
        dtype=dtype,
    )


class _Ends(NamedTuple):
    """What is before and after a stage's layers, as in `AudioLMStage` and `Decoder`."""

    bias: LineBias | GridBias | None
    head: Tensor
    head_bias: Tensor | None
    embedding: Tensor
    target_start: Tensor
    context_start: Tensor | None = None
    context_embedding: Tensor | None = None


def _read_ends(entries: Entries, length: int) -> _Ends:
    line = entries.below("transformer.rel_pos_bias.")
    names = entries.names()
    if "start_token" in names:
        return _Ends(
            bias=read_line_bias(line, length, None),
            head=entries.take("to_logits.weight").float()[None],
            head_bias=entries.take("to_logits.bias").float()[None],
            embedding=entries.take("semantic_embedding.weight").float()[None],
            target_start=entries.take("start_token").float(),
        )
    if "semantic_start_token" in names:
        # What it predicts of its context, no generation asks for.
        entries.drop(("to_semantic_logits.weight", "to_semantic_logits.bias"))
        head = entries.take("coarse_logit_weights").float()
        # A level's rows begin codebook_size after those of the level before: its last, the end
        # token's, is the next one's first.
        return _Ends(
            bias=read_line_bias(line, length, entries.take_if_there("cross_attn_bias")),
            head=head,
            head_bias=None,
            embedding=_level_embeddings(entries, "coarse", head.shape[1], head.shape[1] - 1),
            target_start=entries.take("coarse_start_token").float(),
            context_start=entries.take("semantic_start_token").float(),
            context_embedding=entries.take("semantic_embedding.weight").float()[None],
        )
    if "fine_start_token" in names:
        entries.drop(("coarse_logit_weights",))
        head = entries.take("fine_logit_weights").float()
        size = head.shape[1]
        context = _level_embeddings(entries, "coarse", size, size)
        start = entries.take_if_there("null_pos_bias")
        mlp, levels = entries.below("pos_bias_mlp."), len(context) + len(head)
        return _Ends(
            bias=read_grid_bias(mlp, length, len(context), levels, start),
            head=head,
            head_bias=None,
            embedding=_level_embeddings(entries, "fine", size, size),
            target_start=entries.take("fine_start_token").float(),
            context_start=entries.take("coarse_start_token").float(),
            context_embedding=context,
        )
    raise ValueError("state has no start token: want a stage of audiolm-pytorch")


def _level_embeddings(entries: Entries, name: str, size: int, stride: int) -> Tensor:
    """[L, size, D]: the sum of a token's embedding, of which a level has `stride` rows, and its
    level's."""
    tokens = entries.take(f"{name}_embedding.weight").float()
    levels = entries.take(f"{name}_quantize_embedding.weight").float()
    rows = [tokens[stride * level : stride * level + size] for level in range(len(levels))]
    return torch.stack(rows) + levels[:, None]


def _embed(name: str, tokens: Tensor, embedding: Tensor) -> Tensor:
    """[B, N, D] of tokens [B, N], frame by frame, by embedding [L, V, D]."""
    levels, size, _ = embedding.shape
    if tokens.numel() and tokens.device.type == "cpu":  # elsewhere the look would synchronise
        lowest, highest = (int(token) for token in tokens.aminmax())
        if lowest < 0 or highest >= size:
            raise ValueError(f"{name} spans {lowest} to {highest}, wanted 0 to {size - 1}")
    level = torch.arange(tokens.shape[1], device=tokens.device) % levels
    return embedding[level, tokens]


def packed(weight: Tensor, *, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> Weight:
    """A weight [N, K] as a step streams it: in `dtype`, or in 8 bits.

    Widths here are such as 1365: rows begin at multiples of `COLUMNS`, with zeros between them.
    """
    scale = None
    if weight_dtype is None:
        values = weight.to(dtype)
    else:
        values, scale = quantize_weight(weight, weight_dtype)
    if gap := -values.shape[1] % COLUMNS:
        wide = values.new_zeros(len(values), values.shape[1] + gap)
        wide[:, :-gap] = values
        values = wide[:, :-gap]
    return Weight(values.contiguous() if not gap else values, scale)
