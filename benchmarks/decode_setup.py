"""One decode step as a problem: the case, what all providers are given, and what is right."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Tensors, Work
from benchmarks.decode_models import (
    DIM_HEAD,
    VOCABULARY,
    audiolm_stage,
    audiolm_state,
    in_float64,
    mapped,
    narrowed,
    paper_decoder,
    weight_bytes,
)
from benchmarks.gate import Verdict
from benchmarks.record import Row
from musiclm_engine.generation.cache import CachedLayer, KVCache
from musiclm_engine.generation.decoder import Decoder, Memory, step_layers
from musiclm_engine.generation.ops import DEFINITIONS, StepOps

TEXT_LENGTH = 8  # tokens of conditioning
MAX_STEPS = 512  # of one measurement: the caches have room for them


@dataclass(frozen=True, kw_only=True)
class DecodeStepCase(Case):
    """`batch` sequences of `context` tokens each; with guidance twice as many rows."""

    op: ClassVar[str] = "decode_step"
    model: str  # "audiolm" or "paper": see decode_models.py
    dim: int
    depth: int
    heads: int
    batch: int
    context: int
    guidance: float | None = None

    @property
    def name(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        return (
            f"{self.model} {self.depth} x {self.dim}, batch {self.batch}, "
            f"context {self.context}{guided}, {self.dtype}"
        )

    @property
    def rows(self) -> int:
        return self.batch if self.guidance is None else 2 * self.batch

    @property
    def key_heads(self) -> int:
        return 1 if self.model == "audiolm" else self.heads

    def work(self) -> Work:
        raise NotImplementedError("see Setup.bytes_of: it depends on a provider's weights")


class Measured(NamedTuple):
    """A provider, built: `step` is what is timed, `verdict` of what it computes."""

    step: Callable[[], object]
    verdict: Verdict
    num_bytes: float
    agreement: Row


class Setup:
    """What all providers of a case are given, and what is right."""

    def __init__(self, case: DecodeStepCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.slots = case.context + MAX_STEPS
        generator = torch.Generator().manual_seed(case.context + case.batch)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float().to(device)

        self.state: dict[str, Tensor] = {}
        if case.model == "audiolm":
            self.state = audiolm_state(case.dim, case.depth, case.heads)
        shape = (case.rows, case.key_heads, case.context, DIM_HEAD)
        self.filled = [(normal(*shape), normal(*shape)) for _ in range(case.depth)]
        self.ids = torch.randint(VOCABULARY, (case.batch, case.context), generator=generator)
        self.ids = self.ids.to(device)
        self.text = normal(case.batch, TEXT_LENGTH, case.dim)

    def decoder(
        self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
    ) -> tuple[Decoder, Memory | None]:
        """The case's weights, and what its cross-attention attends to."""
        case = self.case
        if case.model == "paper":
            return narrowed(self._paper, dtype, weight_dtype), None
        state = {name: value.to(self.device) for name, value in self.state.items()}
        stage = audiolm_stage(state, self.slots + 1, dtype, weight_dtype)
        text = torch.cat([self.text, self.text])[: case.rows]
        mask = torch.ones(case.rows, TEXT_LENGTH, dtype=torch.bool, device=self.device)
        mask[case.batch :] = False
        return stage.decoder, stage.memory(text, mask)

    @cached_property
    def _paper(self) -> Decoder:
        case = self.case
        return paper_decoder(case.dim, case.depth, case.heads, self.slots + 1, self.device)

    def input_of(self, decoder: Decoder) -> Tensor:
        """[R, D] or [R, s, D] float32: the embedding of the last tokens."""
        x = decoder.embedding[0, self.ids[:, -1]].float()
        x = torch.cat([x, x])[: self.case.rows]
        return x if decoder.streams == 1 else x[:, None].repeat(1, decoder.streams, 1)

    def fill(self, layers: tuple[CachedLayer, ...]) -> None:
        for layer, (keys, values) in zip(layers, self.filled, strict=True):
            layer.keys[:, :, : self.case.context] = keys.to(layer.keys.dtype)
            layer.values[:, :, : self.case.context] = values.to(layer.values.dtype)

    def results(
        self,
        decoder: Decoder,
        memory: Memory | None,
        dtype: torch.dtype,
        ops: StepOps,
        stream: torch.dtype | None = None,
    ) -> Tensors:
        """The last layer's new keys and values, and the logits, of one step by `ops`; `stream` is
        the residual's dtype if it is not the usual one."""
        case, wide = self.case, torch.promote_types(dtype, torch.float32)
        cache = KVCache.empty(
            layers=case.depth, batch=case.rows, heads=case.key_heads, slots=case.context + 1,
            dim_head=DIM_HEAD, device=self.device, dtype=dtype,
        )  # fmt: skip
        self.fill(cache.layers)
        cache.positions.fill_(case.context)
        cache.lengths.fill_(case.context + 1)
        codes = torch.arange(case.context + 1, dtype=torch.int32, device=self.device)
        x = self.input_of(decoder).to(stream or wide)
        step_layers(
            decoder, x, cache, memory=memory, q_code=codes[-1:].expand(case.rows).contiguous(),
            k_codes=codes[None], dtype=dtype, ops=ops,
        )  # fmt: skip
        hidden = (x if decoder.streams == 1 else x.sum(1)).to(wide)
        weight, bias = (None if p is None else p.to(wide) for p in decoder.norm)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], weight, bias)
        head = decoder.head[0].to(wide)
        if decoder.head_scale is not None:
            head = head * decoder.head_scale[0][:, None]
        logits = hidden @ head.T
        if decoder.head_bias is not None:
            logits = logits + decoder.head_bias[0]
        return {**newest(cache.layers, case.context), "logits": self.guided(logits)}

    def guided(self, logits: Tensor) -> Tensor:
        if self.case.guidance is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.case.guidance * (conditional - unconditional)

    def truth(self, decoder: Decoder, memory: Memory | None) -> Tensors:
        """The definition, in float64."""
        wide = None if memory is None else mapped(memory, _doubled, Tensor)
        return self.results(in_float64(decoder), wide, torch.float64, DEFINITIONS)

    def yardstick(self, decoder: Decoder, memory: Memory | None) -> Tensors:
        """Plain PyTorch with everything in the case's precision, the residual stream too."""
        dtype = self.case.torch_dtype
        return self.results(decoder, memory, dtype, DEFINITIONS, stream=dtype)

    @cached_property
    def whole_truth(self) -> Tensors:
        return self.truth(*self.decoder(torch.float32))

    def num_bytes(self, decoder: Decoder, cache_dtype: torch.dtype) -> float:
        case = self.case
        cache = 2 * case.depth * case.rows * case.key_heads * case.context * DIM_HEAD
        return weight_bytes(decoder) + cache * cache_dtype.itemsize


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def newest(layers: tuple[CachedLayer, ...], slot: int) -> Tensors:
    last = layers[-1]
    return {"keys": last.keys[:, :, slot].clone(), "values": last.values[:, :, slot].clone()}


def agreement(found: Tensor, wanted: Tensor) -> Row:
    """Of the next token's distribution with that of float32 weights: KL divergence in nats, the
    mean over rows, and the share of rows with the same likeliest token."""
    found, wanted = (logits.double().log_softmax(-1) for logits in (found, wanted))
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    same = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    return {"kl_nats": float(f"{float(divergence):.3g}"), "same_top_1": round(float(same), 3)}
