"""The audio tower's front end, from a spectrogram to tokens: `python -m benchmarks.patch_front`.

Patches, layer norm, projection, layer norm, position, patch dropout. The op chain is
musiclm-pytorch's: its modules in the order of its audio tower, for all patches, of which those that
stay are gathered at the end. Both keep the same patches: the chain is given the indices, and is not
timed choosing them; ours is. The chain's spectrogram is ours transposed, as frequency comes first
there; so the projection's columns mean the same, and the grid is turned. Half precision runs under
autocast.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Call, Case, Provider, Suite, Tensors, Work
from benchmarks.peers import musiclm_pytorch
from benchmarks.run import main
from musiclm_kernels import embed_patches

SEED = 7
# Ours by name, and the name of the same parameter in the chain
PARAMETERS = {
    "patch_norm_weight": "1.weight",
    "patch_norm_bias": "1.bias",
    "weight": "2.weight",
    "bias": "2.bias",
    "norm_weight": "3.weight",
    "norm_bias": "3.bias",
}


@dataclass(frozen=True, kw_only=True)
class PatchFrontCase(Case):
    """`kept` of the patches of a spectrogram of `grid_columns` by `grid_rows`."""

    op: ClassVar[str] = "patch front"
    dtype: str = "bfloat16"
    batch: int
    dim: int = 512
    patch_size: int = 16
    grid_rows: int = 8
    grid_columns: int = 62
    kept: int = 372
    mode: str = "forward+backward"

    @property
    def name(self) -> str:
        return (
            f"B={self.batch} {self.kept} of {self.grid_rows}x{self.grid_columns} patches "
            f"dim={self.dim} {self.dtype}, {self.mode}"
        )

    @property
    def trains(self) -> bool:
        return self.mode == "forward+backward"

    def work(self) -> Work:
        """Of the patches that stay: what has to be read, computed and written."""
        tokens, width = self.batch * self.kept, self.patch_size**2
        product = 2 * tokens * width * self.dim
        num_bytes = tokens * (4 * width + self.torch_dtype.itemsize * self.dim)
        return Work(product * (2 if self.trains else 1), num_bytes * (2 if self.trains else 1))


def make_inputs(case: PatchFrontCase, device: torch.device) -> Tensors:
    """Spectrogram and parameters in float32, the gradient in the case's dtype, and the choice."""
    generator = torch.Generator().manual_seed(case.batch + case.dim)

    def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return (around + scale * torch.randn(*shape, generator=generator)).to(device)

    P, D = case.patch_size, case.dim
    inputs = {
        "spectrogram": normal(case.batch, case.grid_columns * P, case.grid_rows * P, scale=2.0),
        "patch_norm_weight": normal(P * P, scale=0.1, around=1.0),
        "patch_norm_bias": normal(P * P, scale=0.1),
        "weight": normal(D, P * P, scale=1 / P),
        "bias": normal(D, scale=0.1),
        "norm_weight": normal(D, scale=0.1, around=1.0),
        "norm_bias": normal(D, scale=0.1),
        "grad_out": normal(case.batch, case.kept, D).to(case.torch_dtype),
    }
    with torch.no_grad():
        inputs["indices"] = _ours(case, inputs)[1]
    return inputs


def _ours(case: PatchFrontCase, tensors: Tensors) -> tuple[Tensor, ...]:
    parameters = {name: tensors[name] for name in PARAMETERS}
    return embed_patches(
        tensors["spectrogram"],
        patch_size=case.patch_size,
        keep=case.kept,
        seed=SEED,
        **parameters,
    )


def _as_call(case: PatchFrontCase, inputs: Tensors, leaves: Tensors, forward: Any) -> Call:
    """Forward; then, in training, the gradients of the parameters: nothing before them trains."""
    wide = inputs["spectrogram"].dtype == torch.float64
    autocast = partial(
        torch.autocast,
        inputs["spectrogram"].device.type,
        case.torch_dtype,
        enabled=case.dtype != "float32" and not wide,
    )

    def call() -> Tensors:
        with torch.set_grad_enabled(case.trains), autocast():
            out = forward()
        if not case.trains:
            return {"out": out}
        gradients = torch.autograd.grad(out, list(leaves.values()), inputs["grad_out"].to(out))
        named = {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}
        return {"out": out.detach(), **named}

    return call


def plain_front(case: PatchFrontCase, inputs: Tensors) -> Tensors:
    """The chain written out."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in PARAMETERS}
    P, dtype = case.patch_size, inputs["spectrogram"].dtype

    def forward() -> Tensor:
        x = inputs["spectrogram"].unflatten(2, (-1, P)).unflatten(1, (-1, P))
        x = x.permute(0, 1, 3, 4, 2).flatten(3).flatten(1, 2)  # [B, N, bin and frame]
        norm = (leaves["patch_norm_weight"], leaves["patch_norm_bias"])
        x = F.layer_norm(x, x.shape[-1:], *norm)
        x = F.linear(x, leaves["weight"], leaves["bias"])
        x = F.layer_norm(x, x.shape[-1:], leaves["norm_weight"], leaves["norm_bias"])
        frequencies = 10000 ** -torch.linspace(0, 1, case.dim // 4, dtype=dtype, device=x.device)
        places = torch.arange(x.shape[1], device=x.device)[:, None]
        column, row = places // case.grid_rows * frequencies, places % case.grid_rows * frequencies
        x = x + torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), dim=1)
        index = inputs["indices"][:, :, None].expand(-1, -1, case.dim)
        # What is compared has the type that ours gives.
        return x.gather(1, index).to(case.torch_dtype if dtype != torch.float64 else dtype)

    return _as_call(case, inputs, leaves, forward)()


def build_ours(case: PatchFrontCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    leaves = {name: inputs[name].detach().requires_grad_() for name in PARAMETERS}

    def forward() -> Tensor:
        return _ours(case, {**inputs, **leaves})[0]

    return _as_call(case, inputs, leaves, _maybe_compiled(forward, compiled))


def build_op_chain(case: PatchFrontCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    """musiclm-pytorch's modules and its positions, as its `forward` calls them."""
    package = musiclm_pytorch()
    tower = package.AudioSpectrogramTransformer(
        case.dim, 1, patch_size=case.patch_size, accept_spec=True
    )
    modules = tower.to_patch_tokens.to(inputs["spectrogram"].device).train()
    modules.load_state_dict({theirs: inputs[ours] for ours, theirs in PARAMETERS.items()})
    named = dict(modules.named_parameters())
    leaves = {ours: named[theirs] for ours, theirs in PARAMETERS.items()}
    positions = package.musiclm_pytorch.posemb_sincos_2d
    spectrogram = inputs["spectrogram"].transpose(1, 2).contiguous()
    # Its grid is row by row, and its first coordinate is time where ours is.
    column, row = inputs["indices"] // case.grid_rows, inputs["indices"] % case.grid_rows
    kept = row * case.grid_columns + column
    batch = torch.arange(case.batch, device=spectrogram.device)[:, None]

    def forward() -> Tensor:
        x = modules(spectrogram)  # [B, rows, columns, dim]
        x = x + positions(x)
        return x.flatten(1, 2)[batch, kept].to(case.torch_dtype)

    return _as_call(case, inputs, leaves, _maybe_compiled(forward, compiled))


def _maybe_compiled(forward: Any, compiled: bool) -> Any:
    return torch.compile(forward, dynamic=False) if compiled else forward


def cases(device_type: str) -> list[PatchFrontCase]:
    if device_type == "cuda":
        shapes: list[dict[str, Any]] = [{"batch": 32}, {"batch": 128, "dim": 768}]
    else:
        shapes = [{"batch": batch, "dtype": "float32"} for batch in (4, 8)]
    modes = ("forward", "forward+backward")
    return [PatchFrontCase(mode=mode, **shape) for shape in shapes for mode in modes]


def checks() -> list[PatchFrontCase]:
    """Each family of tiles, and grids that no tile divides."""
    shapes: list[dict[str, Any]] = [{"dim": dim} for dim in (32, 100, 192, 512, 768, 1024)] + [
        {"patch_size": 8, "grid_rows": 16, "grid_columns": 5, "kept": 33},
        {"patch_size": 32, "grid_rows": 4, "grid_columns": 7, "kept": 28},
        {"grid_columns": 1, "kept": 1},
    ]
    return [
        PatchFrontCase(batch=2, dtype=dtype, **shape)
        for dtype in ("bfloat16", "float16", "float32")
        for shape in shapes
    ]


SUITE = Suite(
    name="patch_front",
    cases=cases,
    checks=checks,
    make_inputs=make_inputs,
    plain=plain_front,
    providers=(
        Provider("ours", build_ours),
        Provider("ours compiled", partial(build_ours, compiled=True)),
        Provider("op chain", build_op_chain),
        Provider("op chain compiled", partial(build_op_chain, compiled=True)),
    ),
    baseline="ours",
)

if __name__ == "__main__":
    main([SUITE], "The audio tower's front end against musiclm-pytorch's op chain")
