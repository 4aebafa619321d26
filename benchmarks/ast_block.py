"""MuLaN's attention block, forward and backward: `python -m benchmarks.ast_block`.

Layer norm, projections, l2-normalised queries and keys, attention with the bias that an MLP makes
of two patches' offset, output projection: the same weights on the same patches in the engine's
modules and in musiclm-pytorch's. Half precision runs under autocast, as both are trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Call, Case, Provider, Suite, Tensors, Work
from benchmarks.peers import musiclm_pytorch
from benchmarks.run import main
from musiclm_engine.attention import CosineAttention, DynamicPositionBias2d

SCALE = 8.0  # of the cosines, the default of both
# Its gradient is zero: one number added to all scores of a head changes nothing. It is computed by
# everyone and compared by no one.
LAST_BIAS = "mlp.4.bias"


@dataclass(frozen=True, kw_only=True)
class AstBlockCase(Case):
    """One block over the patches of a spectrogram; `kept` of them a row, its own ones, or all."""

    op: ClassVar[str] = "ast block"
    dtype: str = "bfloat16"
    batch: int
    dim: int = 512
    heads: int = 8
    head_dim: int = 64
    grid_rows: int = 8
    grid_columns: int = 62
    kept: int | None = None
    mode: str = "forward+backward"

    @property
    def name(self) -> str:
        dropped = " after patch dropout" if self.kept else ""
        return (
            f"B={self.batch} H={self.heads} N={self.length} of {self.grid_rows}x{self.grid_columns}"
            f"{dropped} dim={self.dim} {self.dtype}, {self.mode}"
        )

    @property
    def length(self) -> int:
        return self.kept or self.grid_rows * self.grid_columns

    @property
    def mlp_width(self) -> int:
        return self.dim // 4

    def work(self) -> Work:
        """With the MLP of the offsets, not of the pairs: what has to be computed."""
        inner, tokens = self.heads * self.head_dim, self.batch * self.length
        projections = 3 * 2 * tokens * self.dim * 4 * inner
        attention = 14 * tokens * self.length * inner
        offsets = (2 * self.grid_rows - 1) * (2 * self.grid_columns - 1)
        layers = 2 * self.mlp_width + self.mlp_width**2 + self.mlp_width * self.heads
        # x, out and their gradients
        num_bytes = 4 * tokens * self.dim * self.torch_dtype.itemsize
        return Work(projections + attention + 3 * 2 * offsets * layers, num_bytes)


def make_inputs(case: AstBlockCase, device: torch.device) -> Tensors:
    """x and the weights in float32, the gradient in the case's dtype, and each patch's place."""
    generator = torch.Generator().manual_seed(case.batch + case.length)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return (around + scale * torch.randn(*shape, generator=generator)).to(device)

    inner, width, dim = case.heads * case.head_dim, case.mlp_width, case.dim
    inputs = {
        "x": normal(case.batch, case.length, dim),
        "grad_out": normal(case.batch, case.length, dim).to(case.torch_dtype),
        "attention.norm.learned_gamma": normal(dim, scale=0.1, around=1.0),
        "attention.to_q.weight": normal(inner, dim, scale=dim**-0.5),
        "attention.to_kv.weight": normal(2 * inner, dim, scale=dim**-0.5),
        "attention.q_scale": normal(case.head_dim, scale=0.1, around=1.0),
        "attention.k_scale": normal(case.head_dim, scale=0.1, around=1.0),
        "attention.to_out.0.weight": normal(dim, inner, scale=inner**-0.5),
        "mlp.0.weight": normal(width, 2, scale=1 / 16),  # offsets are large
        "mlp.0.bias": normal(width, scale=0.1),
        "mlp.2.weight": normal(width, width, scale=width**-0.5),
        "mlp.2.bias": normal(width, scale=0.1),
        "mlp.4.weight": normal(case.heads, width, scale=width**-0.5),
        "mlp.4.bias": normal(case.heads, scale=0.1),
    }
    places = torch.arange(case.grid_rows * case.grid_columns).expand(case.batch, -1)
    if case.kept:
        shuffled = torch.rand(places.shape, generator=generator).argsort(1)
        places = shuffled[:, : case.kept].sort(1).values
    inputs["places"] = places.to(device)  # [B, N], column by column
    return inputs


def plain_block(case: AstBlockCase, inputs: Tensors) -> Tensors:
    """The block written out, with the bias of every pair."""

    def forward(x: Tensor, weights: Tensors) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else case.torch_dtype
        gamma = weights["attention.norm.learned_gamma"]
        x = F.layer_norm(x, x.shape[-1:], gamma)
        q = F.linear(x, weights["attention.to_q.weight"])
        k, v = F.linear(x, weights["attention.to_kv.weight"]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (case.heads, -1)).transpose(1, 2) for t in (q, k, v))
        q = F.normalize(q, dim=-1) * weights["attention.q_scale"]
        k = F.normalize(k, dim=-1) * weights["attention.k_scale"]
        bias = _offsets(case, inputs["places"]).to(dtype)
        for layer in (0, 2, 4):
            bias = F.linear(bias, weights[f"mlp.{layer}.weight"], weights[f"mlp.{layer}.bias"])
            bias = bias if layer == 4 else F.silu(bias)
        scores = q.to(dtype) @ k.to(dtype).mT * SCALE + bias.permute(0, 3, 1, 2)
        out = scores.softmax(-1).to(dtype) @ v
        return F.linear(out.transpose(1, 2).flatten(2), weights["attention.to_out.0.weight"])

    leaves = {name: inputs[name].detach().requires_grad_() for name in _weight_names(inputs)}
    return _as_call(case, inputs, forward, leaves)()


def _weight_names(inputs: Tensors) -> list[str]:
    return [name for name in inputs if name.startswith(("attention.", "mlp."))]


def _offsets(case: AstBlockCase, places: Tensor) -> Tensor:
    """[B or 1, N, N, 2]: rows and columns from the second patch to the first."""
    if not case.kept:
        places = places[:1]
    grid = torch.stack((places % case.grid_rows, places // case.grid_rows), dim=-1)
    return grid[:, :, None] - grid[:, None, :]


def _autocast(case: AstBlockCase, x: Tensor) -> AbstractContextManager[None]:
    wanted = case.dtype != "float32" and x.dtype == torch.float32
    return torch.autocast(x.device.type, case.torch_dtype, enabled=wanted)


def _as_call(
    case: AstBlockCase,
    inputs: Tensors,
    forward: Callable[[Tensor, Tensors], Tensor],
    weights: Tensors,
) -> Call:
    """Forward, then the gradients of the input and of all weights."""
    x = inputs["x"].detach().requires_grad_()
    leaves = {"x": x, **weights}

    def call() -> Tensors:
        with _autocast(case, x):
            out = forward(x, weights)
        gradients = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"])
        found = {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}
        del found[f"grad_{LAST_BIAS}"]
        return {"out": out.detach(), **found}

    return call


def _with_weights(attention: nn.Module, mlp: nn.Module, inputs: Tensors) -> Tensors:
    """The parameters of both modules, which now have the case's values: their names are the same in
    both packages."""
    modules = nn.ModuleDict({"attention": attention, "mlp": mlp}).to(inputs["x"].device).train()
    modules.load_state_dict({name: inputs[name] for name in _weight_names(inputs)})
    return dict[str, Tensor](modules.named_parameters())


def build_ours(case: AstBlockCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    attention = CosineAttention(case.dim, dim_head=case.head_dim, heads=case.heads)
    mlp = DynamicPositionBias2d(case.mlp_width, case.heads)
    weights = _with_weights(attention, mlp, inputs)
    places = inputs["places"]

    def forward(x: Tensor, _: Tensors) -> Tensor:
        bias = mlp.position_bias(case.grid_columns, case.grid_rows)
        return attention(x, bias.kept(places) if case.kept else bias)

    return _as_call(case, inputs, _maybe_compiled(forward, compiled), weights)


def build_musiclm_pytorch(case: AstBlockCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    """The modules that its audio tower makes, called as its `forward` does."""
    tower = musiclm_pytorch().AudioSpectrogramTransformer(
        case.dim, 1, dim_head=case.head_dim, heads=case.heads, accept_spec=True
    )
    attention, mlp = tower.transformer.layers[0][0], tower.dynamic_pos_bias_mlp
    weights = _with_weights(attention, mlp, inputs)
    offsets = _offsets(case, inputs["places"])
    if not case.kept:
        offsets = offsets[0]  # its grid has a batch axis only after patch dropout

    def forward(x: Tensor, _: Tensors) -> Tensor:
        return attention(x, rel_pos_bias=mlp(offsets.float()))

    return _as_call(case, inputs, _maybe_compiled(forward, compiled), weights)


def _maybe_compiled(forward: Callable[..., Tensor], compiled: bool) -> Callable[..., Tensor]:
    return torch.compile(forward, dynamic=False) if compiled else forward


def cases(device_type: str) -> list[AstBlockCase]:
    shapes: list[dict[str, Any]] = [{}, {"kept": 372}]
    cuda = device_type == "cuda"
    return [
        AstBlockCase(batch=batch, dtype="bfloat16" if cuda else "float32", **shape)
        for batch, shape in product((1, 4, 32) if cuda else (1, 4), shapes)
    ]


SUITE = Suite(
    name="ast_block",
    cases=cases,
    make_inputs=make_inputs,
    plain=plain_block,
    providers=(
        Provider("ours", build_ours),
        Provider("ours compiled", partial(build_ours, compiled=True)),
        Provider("musiclm-pytorch", build_musiclm_pytorch),
        Provider("musiclm-pytorch compiled", partial(build_musiclm_pytorch, compiled=True)),
    ),
    baseline="ours",
)

if __name__ == "__main__":
    main([SUITE], "MuLaN's attention block against musiclm-pytorch's")
