"""Attention with a positional bias from a table: `python -m benchmarks.attention`.

Providers that read a table (ours, FlexAttention) are given the table. Those that read a bias
[B, H, N, N] get it ready made where only the forward pass is timed, as for fixed weights; in a
training step the table changes, so making the bias is part of their time and its gradient goes
back into the table. Those that know no bias are timed without, checked without, and say so.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Call, CannotRun, Case, Provider, Suite, Tensors, Work
from benchmarks.peers import import_peer
from benchmarks.run import main
from musiclm_engine.attention import DynamicPositionBias2d
from musiclm_kernels import biased_attention

Mode = Literal["forward", "backward", "forward+backward"]
Bias = Literal["none", "table", "mlp"]
MLP_WIDTH = 128  # a quarter of the audio tower's 512
MLP_PARAMETERS = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight")
# The gradient of "mlp.4.bias" is zero: one number added to all scores of a head changes nothing. It
# is computed by everyone and compared by no one.
MLP_LAST_BIAS = "mlp.4.bias"


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """Self-attention over the patches of a grid, or over a line, which is a grid of one row.

    `kept` is how many patches each batch row keeps, its own ones; None is all. With bias "mlp" the
    table comes from a three-layer MLP of the offset within the time.
    """

    op: ClassVar[str] = "attention"
    dtype: str = "bfloat16"
    batch: int
    heads: int = 8
    head_dim: int = 64
    grid_rows: int = 1
    grid_columns: int
    kept: int | None = None
    bias: Bias = "table"
    mode: Mode = "forward"
    table_gradient: bool = True
    layout: Literal["BHND", "BNHD"] = "BHND"  # of q, k and v in memory

    @property
    def name(self) -> str:
        tokens = (
            f"N={self.grid_columns}"
            if self.grid_rows == 1
            else f"N={self.length} of {self.grid_rows}x{self.grid_columns}"
        )
        shape = f"B={self.batch} H={self.heads} {tokens} D={self.head_dim} {self.layout}"
        frozen = (
            " without table gradient"
            if self.bias == "table" and self.mode != "forward" and not self.table_gradient
            else ""
        )
        return f"{shape} {self.dtype}, bias {self.bias}, {self.mode}{frozen}"

    @property
    def length(self) -> int:
        return self.kept or self.grid_rows * self.grid_columns

    @property
    def table_size(self) -> int:
        return (2 * self.grid_rows - 1) * (2 * self.grid_columns - 1)

    @property
    def offset(self) -> int:
        """Added to the difference of two codes: the smallest one becomes 0."""
        return self.table_size // 2

    def trained(self) -> tuple[str, ...]:
        """The inputs whose gradients are results."""
        if self.mode == "forward":
            return ()
        if self.bias == "mlp":
            return ("q", "k", "v", *MLP_PARAMETERS)
        with_table = self.bias == "table" and self.table_gradient
        return ("q", "k", "v", "table") if with_table else ("q", "k", "v")

    def work(self) -> Work:
        """4 B H N^2 D FLOPs forward and 10 backward, which recomputes the scores."""
        pairs = self.batch * self.heads * self.length**2 * self.head_dim
        tensor_bytes = (
            self.batch * self.heads * self.length * self.head_dim * self.torch_dtype.itemsize
        )
        # forward: q, k, v, out. With their gradients four more; backward alone reads `out`.
        tensors = {"forward": 4, "backward": 8, "forward+backward": 8}[self.mode]
        products = {"forward": 4, "backward": 10, "forward+backward": 14}[self.mode]
        mlp_flops = 0
        if self.bias == "mlp":
            layers = 2 * MLP_WIDTH + MLP_WIDTH**2 + MLP_WIDTH * self.heads
            passes = {"forward": 1, "backward": 2, "forward+backward": 3}[self.mode]
            mlp_flops = 2 * passes * self.table_size * layers
        return Work(products * pairs + mlp_flops, tensors * tensor_bytes)


def make_inputs(case: AttentionCase, device: torch.device) -> Tensors:
    """Random q, k, v and gradient, the table or the MLP in float32, and the codes."""
    generator = torch.Generator().manual_seed(len(case.name) + case.length)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    order = (case.batch, case.heads, case.length, case.head_dim)
    inputs: Tensors = {}
    for name in ("q", "k", "v", "grad_out"):
        if case.layout == "BHND":
            tensor = normal(*order).to(device, case.torch_dtype)
        else:
            tensor = normal(order[0], order[2], order[1], order[3])
            tensor = tensor.to(device, case.torch_dtype).transpose(1, 2)
        inputs[name] = tensor
    if case.bias == "table":
        inputs["table"] = normal(case.heads, case.table_size).to(device)
    if case.bias == "mlp":
        for layer, (wide, narrow) in zip(
            (0, 2, 4),
            ((MLP_WIDTH, 2), (MLP_WIDTH, MLP_WIDTH), (case.heads, MLP_WIDTH)),
            strict=True,
        ):
            scale = narrow**-0.5 / (
                16 if layer == 0 else 1
            )  # as the audio tower's: offsets are big
            inputs[f"mlp.{layer}.weight"] = normal(wide, narrow, scale=scale).to(device)
            inputs[f"mlp.{layer}.bias"] = normal(wide, scale=0.1).to(device)
    columns = torch.arange(case.grid_columns, dtype=torch.int32)[:, None]
    rows = torch.arange(case.grid_rows, dtype=torch.int32)
    codes = (columns * (2 * case.grid_rows - 1) + rows).view(1, -1)
    if case.kept is not None:
        order_of_patches = torch.rand(case.batch, codes.shape[1], generator=generator).argsort(1)
        codes = codes[0][order_of_patches[:, : case.kept].sort(1).values]
    inputs["codes"] = codes.to(device)
    return inputs


def plain_attention(case: AttentionCase, inputs: Tensors) -> Tensors:
    """softmax(q k^T / sqrt(D) + bias) v and its gradients, each step in q's dtype."""
    leaves = _leaves(case, inputs)
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    scores = q @ k.mT * case.head_dim**-0.5
    if case.bias != "none":
        # by the MLP of all pairs, not of all offsets: a second way to what `ours` computes
        bias = (_mlp_of_pairs if case.bias == "mlp" else _pair_bias)(case, leaves)
        scores = scores + bias.to(q.dtype)
    out = scores.softmax(-1) @ v
    results = {} if case.mode == "backward" else {"out": out.detach()}
    return results | _gradients(case, leaves, out, inputs["grad_out"])


def _leaves(case: AttentionCase, inputs: Tensors) -> Tensors:
    """The inputs, those to be trained as leaves of a graph of their own."""
    trained = case.trained()
    if case.bias == "mlp" and trained:
        trained = (*trained, MLP_LAST_BIAS)
    return {
        name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items()
    }


def _gradients(
    case: AttentionCase, leaves: Tensors, out: Tensor, grad_out: Tensor, *, again: bool = False
) -> Tensors:
    trained = case.trained()
    if not trained:
        return {}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(out, wanted, grad_out, retain_graph=again)
    found = dict(zip(names, gradients, strict=True))
    return {f"grad_{name}": found[name] for name in trained}


def _mlp(leaves: Tensors, x: Tensor, dtype: torch.dtype) -> Tensor:
    for layer in (0, 2, 4):
        x = F.linear(
            x, leaves[f"mlp.{layer}.weight"].to(dtype), leaves[f"mlp.{layer}.bias"].to(dtype)
        )
        x = x if layer == 4 else F.silu(x)
    return x


def _pair_bias(case: AttentionCase, leaves: Tensors) -> Tensor:
    """[B or 1, H, N, N], gathered from the table that the case gives."""
    codes = leaves["codes"].long()
    index = codes[:, :, None] - codes[:, None, :] + case.offset
    bias = leaves["table"].gather(1, index.flatten().expand(case.heads, -1))
    return bias.view(case.heads, *index.shape).transpose(0, 1)


def _mlp_of_pairs(case: AttentionCase, leaves: Tensors) -> Tensor:
    """[B or 1, H, N, N] by the MLP of all N^2 pairs, in q's dtype: what has no table does."""
    codes = leaves["codes"].long()
    width = 2 * case.grid_rows - 1
    grid = torch.stack((codes % width, codes // width), dim=-1)  # [B or 1, N, 2]: row, column
    offsets = grid[:, :, None] - grid[:, None, :]
    dtype = leaves["q"].dtype
    return _mlp(leaves, offsets.to(dtype), dtype).permute(0, 3, 1, 2)


Attend = Callable[[Tensors], Tensor]


def _as_call(case: AttentionCase, inputs: Tensors, attend: Attend) -> Call:
    """What is timed: the forward pass, or with its gradients, or those alone."""
    leaves = _leaves(case, inputs)
    grad_out = inputs["grad_out"]
    if case.mode == "forward":

        def forward() -> Tensors:
            with torch.no_grad():
                return {"out": attend(leaves)}

        return forward
    if case.mode == "backward":
        ready = attend(leaves)
        return lambda: _gradients(case, leaves, ready, grad_out, again=True)

    def both() -> Tensors:
        out = attend(leaves)
        return {"out": out.detach(), **_gradients(case, leaves, out, grad_out)}

    return both


def _without_bias(case: AttentionCase) -> AttentionCase:
    return replace(case, bias="none")


class _TableOfMLP(nn.Module):
    """The engine's own way from its MLP to a table."""

    def __init__(self, case: AttentionCase):
        super().__init__()
        self.mlp = DynamicPositionBias2d(MLP_WIDTH, case.heads)
        self.grid = (case.grid_columns, case.grid_rows)

    def forward(self) -> Tensor:
        return self.mlp.position_bias(*self.grid).table


def _table_reader(case: AttentionCase, inputs: Tensors) -> Callable[[Tensors], Tensor | None]:
    """How a provider that reads a table gets it."""
    if case.bias == "none":
        return lambda leaves: None
    if case.bias == "table":
        return lambda leaves: leaves["table"]
    module = _TableOfMLP(case).to(inputs["q"].device)

    def of_mlp(leaves: Tensors) -> Tensor:
        parameters = {n: leaf for n, leaf in leaves.items() if n.startswith("mlp.")}
        return torch.func.functional_call(module, parameters, ())

    return of_mlp


def build_ours(case: AttentionCase, inputs: Tensors, *, bounded: bool = False) -> Call:
    """With `bounded`, told what no score exceeds, as attention over normalised queries can be."""
    bound = None
    if bounded:
        norms = [inputs[name].float().norm(dim=-1).amax(dim=(0, 2)) for name in ("q", "k")]
        bound = norms[0] * norms[1] * case.head_dim**-0.5
    table_of = _table_reader(case, inputs)
    codes = None if case.bias == "none" else inputs["codes"]

    def attend(leaves: Tensors) -> Tensor:
        return biased_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            table=table_of(leaves),
            q_codes=codes,
            k_codes=codes,
            offset=case.offset,
            score_bound=bound,
            grid_rows=case.grid_rows,
        )

    return _as_call(case, inputs, attend)


def build_flex(case: AttentionCase, inputs: Tensors, *, mode: str | None = None) -> Call:
    """PyTorch's FlexAttention, compiled for the shape, with a score_mod that reads the table."""
    if inputs["q"].device.type != "cuda":
        raise CannotRun("FlexAttention's backward pass and captured gradients are for CUDA alone")
    from torch.nn.attention.flex_attention import flex_attention

    codes, offset = inputs["codes"], case.offset
    one_row = codes.shape[0] == 1
    line = codes[0]
    table_of = _table_reader(case, inputs)

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        if table is None:
            return flex_attention(q, k, v)

        def shared(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[h, line[i] - line[j] + offset]

        def of_row(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[h, codes[b, i] - codes[b, j] + offset]

        return flex_attention(q, k, v, score_mod=shared if one_row else of_row)

    compiled = torch.compile(attention, dynamic=False, fullgraph=True, mode=mode)

    def attend(leaves: Tensors) -> Tensor:
        table = table_of(leaves)
        if table is not None and case.bias == "mlp":
            # torch 2.13 loses the gradient of a captured tensor that is a view
            table = table.clone()
        return compiled(leaves["q"], leaves["k"], leaves["v"], table)

    # The backward pass alone is timed over one forward pass, so it may not eat what that left.
    keeps = nullcontext()
    if case.mode == "backward":
        keeps = torch._functorch.config.patch(donated_buffer=False)
    with keeps:
        call = _as_call(case, inputs, attend)
        call()
    return call


def build_sdpa(case: AttentionCase, inputs: Tensors, *, backend: SDPBackend) -> Call:
    """PyTorch's own attention by one of its backends, the bias as a tensor."""
    bias_of = _bias_reader(case, inputs)

    def attend(leaves: Tensors) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                leaves["q"], leaves["k"], leaves["v"], attn_mask=bias_of(leaves)
            )

    return _as_call(case, inputs, attend)


def build_xformers(case: AttentionCase, inputs: Tensors) -> Call:
    operations = import_peer("xformers.ops")
    bias_of = _bias_reader(case, inputs)

    def attend(leaves: Tensors) -> Tensor:
        q, k, v = (leaves[name].transpose(1, 2) for name in ("q", "k", "v"))
        out = operations.memory_efficient_attention(q, k, v, attn_bias=bias_of(leaves))
        return out.transpose(1, 2)

    return _as_call(case, inputs, attend)


def build_flash_attention_4(case: AttentionCase, inputs: Tensors) -> Call:
    flash = import_peer("flash_attn.cute").flash_attn_func

    def attend(leaves: Tensors) -> Tensor:
        out = flash(*(leaves[name].transpose(1, 2) for name in ("q", "k", "v")))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return _as_call(case, inputs, attend)


def _bias_reader(case: AttentionCase, inputs: Tensors) -> Callable[[Tensors], Tensor | None]:
    """How a provider that reads a whole bias gets it: see the head of this file."""
    if case.bias == "none":
        return lambda leaves: None

    def make(leaves: Tensors) -> Tensor:
        bias = (_mlp_of_pairs if case.bias == "mlp" else _pair_bias)(case, leaves)
        bias = bias.to(leaves["q"].dtype)
        # The memory-efficient kernels read rows of whole 16 bytes.
        bias = F.pad(bias, (0, -case.length % 8))[..., : case.length]
        return bias.expand(case.batch, -1, -1, -1)

    if case.bias == "table" and case.mode == "forward":
        ready = make(inputs)
        return lambda leaves: ready
    return make


def cases(device_type: str) -> list[AttentionCase]:
    """What a device of this type can do: a GPU full of work, a CPU a row of it."""
    cuda = device_type == "cuda"

    def case(batch: int, **shape: Any) -> AttentionCase:
        dtype = "bfloat16" if cuda else "float32"
        return AttentionCase(batch=batch if cuda else 1, dtype=dtype, **shape)

    grids: list[dict[str, Any]] = [
        {"batch": 32, "grid_rows": 8, "grid_columns": 62},
        {"batch": 32, "grid_rows": 8, "grid_columns": 62, "kept": 372},
    ]
    lines: list[dict[str, Any]] = [
        {"batch": 16, "grid_columns": 1024},
        {"batch": 8, "grid_columns": 2048},
    ]
    modes: tuple[Mode, ...] = ("forward", "forward+backward")
    listed = [case(**grid, mode=mode) for grid, mode in product(grids, modes)]
    listed += [case(**grid, mode="forward+backward", bias="mlp") for grid in grids]
    listed += [case(**line, mode=mode) for line, mode in product(lines, modes)]
    listed += [
        case(**grid, mode="backward", table_gradient=wanted)
        for grid, wanted in product(grids, (True, False))
    ]
    return listed if cuda else [one for one in listed if one.length < 2048]


PROVIDERS = (
    Provider("ours", build_ours),
    Provider("ours bounded", partial(build_ours, bounded=True)),
    Provider("flex", build_flex),
    Provider("flex tuned", partial(build_flex, mode="max-autotune-no-cudagraphs")),
    Provider("sdpa math", partial(build_sdpa, backend=SDPBackend.MATH)),
    Provider("sdpa efficient", partial(build_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION)),
    Provider("sdpa cudnn", partial(build_sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
    Provider("xformers", build_xformers),
    *(
        Provider(f"{name}, no bias", build, answers=_without_bias)
        for name, build in (
            ("ours", build_ours),
            ("flex", build_flex),
            ("sdpa flash", partial(build_sdpa, backend=SDPBackend.FLASH_ATTENTION)),
            ("sdpa cudnn", partial(build_sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
            ("flash-attn-4", build_flash_attention_4),
        )
    ),
)

SUITE = Suite(
    name="attention",
    cases=cases,
    make_inputs=make_inputs,
    plain=plain_attention,
    providers=PROVIDERS,
    baseline="ours",
)

if __name__ == "__main__":
    main([SUITE], "Attention with a positional bias from a table")
