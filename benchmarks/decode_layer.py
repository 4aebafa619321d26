"""The projections of a transformer layer for one token a row: `python -m benchmarks.decode_layer`.

Queries, keys and values, the output projection, the gated feed-forward and the way back: all of a
layer's weights, once. Attention is left out: the queries stand for its result. The residual stream is
float32; keys and values go into a static cache.

The chain is PyTorch's own operations, with the weights in the case's type; it has no product of 8-bit
weights that a GPU and a CPU share. Every call starts from a copy of x, which stands for the token's
embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Call, CannotRun, Case, Provider, Suite, Tensors, Work
from benchmarks.run import main
from musiclm_kernels import decode_linear, decode_qkv, decode_residual, quantize_weight

HEAD_WIDTH = 64
SLOTS = 64
NAMES = ("qkv", "output", "up", "down")
EIGHT_BITS = ("int8", "float8_e4m3fn")


@dataclass(frozen=True, kw_only=True)
class DecodeLayerCase(Case):
    """`dtype` is the weights'; the feed-forward is `feed_forward` wide after its gates."""

    op: ClassVar[str] = "decode layer"
    dtype: str = "bfloat16"
    rows: int
    dim: int = 1024
    feed_forward: int = 4096

    @property
    def name(self) -> str:
        return f"B={self.rows} dim={self.dim} F={self.feed_forward} {self.dtype}"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        D, width = self.dim, self.feed_forward
        return {"qkv": (3 * D, D), "output": (D, D), "up": (2 * width, D), "down": (D, width)}

    @property
    def activation_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype in EIGHT_BITS else self.torch_dtype

    def work(self) -> Work:
        """The weights, and nothing else worth counting."""
        weights = sum(N * K for N, K in self.shapes.values())
        return Work(2 * self.rows * weights, weights * self.torch_dtype.itemsize)


def make_inputs(case: DecodeLayerCase, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(case.rows + case.dim)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return (around + scale * torch.randn(*shape, generator=generator)).to(device)

    D, heads = case.dim, case.dim // HEAD_WIDTH
    inputs = {"x": normal(case.rows, D)}
    for norm in ("attention", "feed_forward"):
        inputs[f"{norm}_norm_weight"] = normal(D, scale=0.1, around=1.0)
        inputs[f"{norm}_norm_bias"] = normal(D, scale=0.1)
    for name, (N, K) in case.shapes.items():
        weight = normal(N, K, scale=K**-0.5)
        if case.dtype in EIGHT_BITS:
            inputs[name], inputs[f"{name}_scale"] = quantize_weight(weight, case.torch_dtype)
        else:
            inputs[name] = weight.to(case.torch_dtype)
    for name in ("k_cache", "v_cache"):
        cache = normal(case.rows, heads, SLOTS, HEAD_WIDTH)
        inputs[name] = cache.to(case.activation_dtype)
    inputs["positions"] = torch.arange(case.rows, device=device) % SLOTS
    return inputs


def _chain(case: DecodeLayerCase, inputs: Tensors, caches: tuple[Tensor, Tensor]) -> Tensors:
    """The layer by PyTorch's operations; products in the weights' type, float32 between layers."""
    D, rows = case.dim, torch.arange(case.rows, device=inputs["x"].device)
    wide = inputs["x"].dtype
    narrow = wide if wide == torch.float64 else case.activation_dtype

    def product(x: Tensor, name: str) -> Tensor:
        y = F.linear(x.to(narrow), inputs[name].to(narrow))
        scale = inputs.get(f"{name}_scale")
        return y if scale is None else (y * scale).to(narrow)

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (D,), inputs[f"{name}_norm_weight"], inputs[f"{name}_norm_bias"])

    x = inputs["x"].clone()
    q, k, v = product(normed(x, "attention"), "qkv").split(D, dim=1)
    for cache, token in zip(caches, (k, v), strict=True):
        cache[rows, :, inputs["positions"]] = token.view(case.rows, -1, HEAD_WIDTH).to(cache.dtype)
    x = x + product(q, "output")
    value, gate = product(normed(x, "feed_forward"), "up").chunk(2, dim=1)
    x = x + product(value * F.gelu(gate), "down")
    return {"q": q, "x": x.to(wide), "k_cache": caches[0], "v_cache": caches[1]}


def plain_layer(case: DecodeLayerCase, inputs: Tensors) -> Tensors:
    return _chain(case, inputs, (inputs["k_cache"].clone(), inputs["v_cache"].clone()))


def _ours(case: DecodeLayerCase, inputs: Tensors, caches: tuple[Tensor, Tensor]) -> Tensors:
    def norm(name: str) -> dict[str, Any]:
        return {f"norm_{part}": inputs[f"{name}_norm_{part}"] for part in ("weight", "bias")}

    scales = {name: inputs.get(f"{name}_scale") for name in NAMES}
    dtype = case.activation_dtype
    x = inputs["x"].clone()
    q, _, _ = decode_qkv(
        x, inputs["qkv"], *caches, inputs["positions"],
        weight_scale=scales["qkv"], dtype=dtype, **norm("attention"),
    )  # fmt: skip
    q = q.flatten(1)
    decode_residual(x, q, inputs["output"], weight_scale=scales["output"])
    h, _ = decode_linear(
        x, inputs["up"],
        weight_scale=scales["up"], activation="geglu", dtype=dtype, **norm("feed_forward"),
    )  # fmt: skip
    decode_residual(x, h, inputs["down"], weight_scale=scales["down"])
    return {"q": q, "x": x, "k_cache": caches[0], "v_cache": caches[1]}


Layer = Callable[[DecodeLayerCase, Tensors, tuple[Tensor, Tensor]], Tensors]


def build(layer: Layer, case: DecodeLayerCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    """Everyone writes into caches of their own."""
    caches = (inputs["k_cache"].clone(), inputs["v_cache"].clone())
    function: Any = torch.compile(layer, dynamic=False, fullgraph=True) if compiled else layer

    def call() -> Tensors:
        with torch.no_grad():
            return function(case, inputs, caches)

    return call


def build_chain(case: DecodeLayerCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    if case.dtype in EIGHT_BITS:
        raise CannotRun("PyTorch has no linear layer of 8-bit weights for every device")
    return build(_chain, case, inputs, compiled=compiled)


def _rows(rows: tuple[int, ...], dtypes: tuple[str, ...], **shape: Any) -> list[DecodeLayerCase]:
    return [DecodeLayerCase(rows=B, dtype=dtype, **shape) for B in rows for dtype in dtypes]


def cases(device_type: str) -> list[DecodeLayerCase]:
    if device_type == "cuda":
        return _rows((1, 2, 4, 16), ("bfloat16", *EIGHT_BITS))
    return _rows((1, 2), ("float32", "bfloat16", "int8"), dim=512, feed_forward=2048)


def checks() -> list[DecodeLayerCase]:
    """Every number of rows around the sides of the kernels' families, and widths that no tile is."""
    dtypes = ("bfloat16", "float16", "float32", *EIGHT_BITS)
    return [
        *_rows((1, 3, 4, 5, 15, 16, 17), dtypes),
        *_rows((2, 16), dtypes, feed_forward=2730),
        *_rows((2, 16), dtypes, dim=320, feed_forward=853),
        *_rows((2, 16), dtypes, dim=2048, feed_forward=8192),
    ]


SUITE = Suite(
    name="decode_layer",
    cases=cases,
    make_inputs=make_inputs,
    plain=plain_layer,
    providers=(
        Provider("ours", partial(build, _ours)),
        Provider("ours compiled", partial(build, _ours, compiled=True)),
        Provider("F.linear", build_chain),
        Provider("F.linear compiled", partial(build_chain, compiled=True)),
    ),
    baseline="ours",
    checks=checks,
)

if __name__ == "__main__":
    main([SUITE], "a layer's projections for one token against F.linear")
