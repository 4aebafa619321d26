"""Attention of one new token over a cache: `python -m benchmarks.decode_attention`.

The cache has twice the slots that are filled, as a static cache does on average. Ours reads the
bias from its table; the others get it ready made as a tensor of scores, which a model makes once a
step for all layers. What knows no table and no float8 says so.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Call, CannotRun, Case, Provider, Suite, Tensors, Work
from benchmarks.run import main
from musiclm_kernels import decode_attention


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """One query a row over `context` filled slots; if ragged, rows have from a share of them on up."""

    op: ClassVar[str] = "decode_attention"
    dtype: str = "bfloat16"
    batch: int
    context: int
    heads: int = 16
    key_heads: int = 16
    head_dim: int = 64
    biased: bool = True
    float8: bool = False
    ragged: bool = False

    @property
    def name(self) -> str:
        heads = f"H={self.heads} Hkv={self.key_heads} D={self.head_dim}"
        options = (self.biased, "table"), (self.float8, "float8"), (self.ragged, "ragged")
        return ", ".join(
            [f"B={self.batch} ctx={self.context} {heads} {self.dtype}"]
            + [word for holds, word in options if holds]
        )

    @property
    def slots(self) -> int:
        return 2 * self.context

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.context] * self.batch
        return [self.context * (b + 1) // self.batch for b in range(self.batch)]

    def work(self) -> Work:
        """The filled part of both caches; queries, results and table are small beside it."""
        filled = sum(self.lengths())
        itemsize = 1 if self.float8 else self.torch_dtype.itemsize
        slot_bytes = 2 * self.key_heads * (self.head_dim * itemsize + (4 if self.float8 else 0))
        rows = 2 * self.batch * self.heads * self.head_dim * self.torch_dtype.itemsize
        table = 4 * self.heads * self.context + 4 * self.context if self.biased else 0
        return Work(4 * filled * self.heads * self.head_dim, filled * slot_bytes + rows + table)


def make_inputs(case: DecodeCase, device: torch.device) -> Tensors:
    generator = torch.Generator(device).manual_seed(case.batch + case.context)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    cache = (case.batch, case.key_heads, case.slots, case.head_dim)
    lengths = torch.tensor(case.lengths(), dtype=torch.int32, device=device)
    inputs = {
        "q": normal(case.batch, case.heads, case.head_dim, dtype=case.torch_dtype),
        "k_cache": normal(*cache, dtype=case.torch_dtype),
        "v_cache": normal(*cache, dtype=case.torch_dtype),
        "lengths": lengths,
    }
    if case.float8:
        for name in ("k", "v"):
            values = inputs[f"{name}_cache"].float()
            scales = values.abs().amax(-1) / 448
            inputs[f"{name}_scales"] = scales
            inputs[f"{name}_cache"] = (values / scales[..., None]).to(torch.float8_e4m3fn)
    if case.biased:
        inputs["table"] = normal(case.heads, case.slots)
        inputs["q_code"] = lengths - 1
        codes = torch.arange(case.slots, dtype=torch.int32, device=device)
        inputs["k_codes"] = codes[None]
    return inputs


def _scores_to_add(case: DecodeCase, inputs: Tensors) -> Tensor:
    """[B, H, S]: the bias, if any, and minus infinity in slots that are not filled."""
    q, lengths = inputs["q"], inputs["lengths"]
    wide = torch.promote_types(q.dtype, torch.float32)
    slot = torch.arange(case.slots, device=q.device)
    hidden = (slot >= lengths[:, None])[:, None]
    added = torch.zeros(case.batch, case.heads, case.slots, dtype=wide, device=q.device)
    if case.biased:
        index = (inputs["q_code"][:, None] - inputs["k_codes"]).long().clamp(0, case.slots - 1)
        added += inputs["table"].to(wide)[:, index].transpose(0, 1)
    return added.masked_fill(hidden, -torch.inf)


def plain_attention(case: DecodeCase, inputs: Tensors) -> Tensors:
    """Scores, softmax and their product with the values, one after another."""
    q = inputs["q"]
    k, v = (inputs[name].to(q.dtype) for name in ("k_cache", "v_cache"))
    if case.float8:
        k, v = (
            x * inputs[name][..., None].to(q.dtype)
            for x, name in ((k, "k_scales"), (v, "v_scales"))
        )
    queries = q.view(case.batch, case.key_heads, -1, case.head_dim)
    added = _scores_to_add(case, inputs).view(case.batch, case.key_heads, -1, case.slots)
    scores = queries @ k.mT * case.head_dim**-0.5 + added
    return {"out": (scores.softmax(-1).to(q.dtype) @ v).view_as(q)}


def build_ours(case: DecodeCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    counters = torch.zeros(case.batch * case.heads, dtype=torch.int32, device=inputs["q"].device)
    arguments: dict[str, Any] = {**inputs, "counters": counters}

    def attend() -> Tensors:
        return {"out": decode_attention(**arguments)}

    return torch.compile(attend, dynamic=False, fullgraph=True) if compiled else attend


def build_sdpa(case: DecodeCase, inputs: Tensors, *, whole: bool) -> Call:
    """PyTorch's own: over the filled slots, whose number the host has to know; or over the whole
    static cache under a mask, which asks nothing of the host."""
    if case.float8:
        raise CannotRun("it has no float8 cache")
    if case.ragged and not whole:
        raise CannotRun("rows are not filled alike")
    seen = slice(0, case.slots if whole else case.context)
    added = None
    if whole or case.biased:
        added = _scores_to_add(case, inputs)[:, :, None, seen].to(case.torch_dtype)
    q = inputs["q"][:, :, None]

    def attend() -> Tensors:
        out = F.scaled_dot_product_attention(
            q, inputs["k_cache"][:, :, seen], inputs["v_cache"][:, :, seen], attn_mask=added,
            enable_gqa=case.key_heads != case.heads,
        )  # fmt: skip
        return {"out": out[:, :, 0]}

    return attend


def build_flex(case: DecodeCase, inputs: Tensors) -> Call:
    """PyTorch's FlexAttention, which reads the table and the lengths."""
    if inputs["q"].device.type != "cuda":
        raise CannotRun("FlexAttention is timed on CUDA alone")
    if case.float8:
        raise CannotRun("it has no float8 cache with scales")
    from torch.nn.attention.flex_attention import flex_attention

    lengths, q = inputs["lengths"], inputs["q"][:, :, None]

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if case.biased:
            index = inputs["q_code"][b] - inputs["k_codes"][0, j]
            score = score + inputs["table"][h, index.clamp(0, case.slots - 1)]
        return torch.where(j < lengths[b], score, -torch.inf)

    def attend() -> Tensors:
        out = flex_attention(
            q, inputs["k_cache"], inputs["v_cache"], score_mod=score,
            enable_gqa=case.key_heads != case.heads,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return {"out": out[:, :, 0]}

    return torch.compile(attend, dynamic=False, fullgraph=True)


def cases(device_type: str) -> list[DecodeCase]:
    if device_type != "cuda":
        return [
            DecodeCase(batch=batch, context=context, heads=8, key_heads=key_heads, dtype="float32")
            for batch, context in ((2, 256), (16, 512))
            for key_heads in (1, 8)
        ]
    sizes = [(1, 1024), (1, 8192), (8, 1024), (64, 1024), (16, 4096), (128, 1024)]
    return [
        *(DecodeCase(batch=batch, context=context) for batch, context in sizes),
        *(DecodeCase(batch=batch, context=context, biased=False) for batch, context in sizes[::3]),
        *(DecodeCase(batch=batch, context=context, key_heads=1) for batch, context in sizes),
        *(DecodeCase(batch=batch, context=context, float8=True) for batch, context in sizes[::3]),
        DecodeCase(batch=64, context=1024, float8=True, key_heads=1),
        DecodeCase(batch=64, context=1024, ragged=True),
        DecodeCase(batch=32, context=1024, heads=32, key_heads=8, head_dim=128),
    ]


def checks() -> list[DecodeCase]:
    """Each family of tiles, and lengths about the sides of a split."""
    listed = [
        DecodeCase(batch=3, context=200, heads=8, key_heads=key_heads, head_dim=width, dtype=dtype)
        for dtype in ("float32", "float16", "bfloat16")
        for width in (16, 64, 80, 128, 256)
        for key_heads in (1, 8)
    ]
    listed += [
        DecodeCase(batch=batch, context=context, heads=8, key_heads=key_heads, ragged=True)
        for batch, context in ((8, 129), (5, 64), (4, 8192))
        for key_heads in (1, 2, 8)
    ]
    listed += [
        DecodeCase(batch=3, context=200, heads=8, key_heads=key_heads, head_dim=width, float8=True)
        for width in (64, 128)
        for key_heads in (1, 8)
    ]
    return listed


PROVIDERS: tuple[Provider[Any], ...] = (
    Provider("ours", build_ours),
    Provider("ours compiled", partial(build_ours, compiled=True)),
    Provider("sdpa, filled slots", partial(build_sdpa, whole=False)),
    Provider("sdpa, whole cache", partial(build_sdpa, whole=True)),
    Provider("flex", build_flex),
)

SUITE = Suite(
    name="decode_attention",
    cases=cases,
    make_inputs=make_inputs,
    plain=plain_attention,
    providers=PROVIDERS,
    baseline="ours",
    checks=checks,
)

if __name__ == "__main__":
    main([SUITE], "Attention of one new token over a cache")
