"""The contrastive losses, forward and backward: `python -m benchmarks.contrastive`.

The definition has a tensor of B * B scores; so has every peer. Each is compiled, too.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Call, CannotRun, Case, Provider, Suite, Tensors, Work
from benchmarks.run import main
from musiclm_kernels import contrastive_loss

TEMPERATURE = 20.0
BIAS = -10.0
LEAVES = ("audio", "text", "temperature")
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ContrastiveCase(Case):
    """B pairs of unit rows; the gradients of both sides and of the temperature."""

    op: ClassVar[str] = "contrastive loss"
    pairs: int
    dim: int = 128
    kind: Literal["softmax", "sigmoid"] = "softmax"

    @property
    def name(self) -> str:
        return f"B={self.pairs} D={self.dim} {self.dtype}, {self.kind}, forward+backward"

    def work(self) -> Work:
        """The scores and the products of their gradient with both sides, once each."""
        products = 3 * 2 * self.pairs**2 * self.dim
        return Work(products, 4 * self.pairs * self.dim * self.torch_dtype.itemsize)


def make_inputs(case: ContrastiveCase, device: torch.device) -> Tensors:
    """Pairs with a cosine of about 0.7, as towers that have learned something give them."""
    generator = torch.Generator().manual_seed(case.pairs)
    rows = torch.randn(2, case.pairs, case.dim, generator=generator)
    rows[1] += rows[0]
    audio, text = F.normalize(rows, dim=-1).to(device, case.torch_dtype)
    return {"audio": audio, "text": text, "temperature": torch.tensor(TEMPERATURE, device=device)}


def plain_loss(audio: Tensor, text: Tensor, temperature: Tensor, *, kind: str) -> Tensor:
    scores = temperature * (audio @ text.T)
    own = torch.arange(len(audio), device=audio.device)
    if kind == "softmax":
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    signs = 2 * torch.eye(len(audio), dtype=scores.dtype, device=scores.device) - 1
    return -F.logsigmoid(signs * (scores + BIAS)).sum() / len(audio)


def _as_call(inputs: Tensors, loss: Loss) -> Call:
    leaves = [inputs[name].detach().requires_grad_() for name in LEAVES]

    def call() -> Tensors:
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        found = {f"grad_{name}": g for name, g in zip(LEAVES, gradients, strict=True)}
        return {"loss": value.detach(), **found}

    return call


def _maybe_compiled(loss: Loss, compiled: bool) -> Loss:
    return torch.compile(loss, dynamic=False) if compiled else loss


def build_plain(case: ContrastiveCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    return _as_call(inputs, _maybe_compiled(partial(plain_loss, kind=case.kind), compiled))


def build_ours(case: ContrastiveCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    bias = BIAS if case.kind == "sigmoid" else None

    def loss(audio: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
        return contrastive_loss(audio, text, temperature, kind=case.kind, bias=bias)

    return _as_call(inputs, _maybe_compiled(loss, compiled))


def _open_clip_losses() -> ModuleType:
    """Its module of losses alone: the package imports image models and torchvision, the file does
    not."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise CannotRun("not importable: open_clip is not installed")
    file = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_open_clip(case: ContrastiveCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    losses = _open_clip_losses()
    if case.kind == "softmax":
        return _as_call(inputs, _maybe_compiled(losses.ClipLoss(), compiled))
    if inputs["audio"].dtype != torch.float32:
        raise CannotRun("its labels are float32 beside scores of another type")
    module = losses.SigLipLoss()

    def loss(audio: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
        return module(audio, text, temperature, torch.full_like(temperature, BIAS))

    return _as_call(inputs, _maybe_compiled(loss, compiled))


def cases(device_type: str) -> list[ContrastiveCase]:
    if device_type != "cuda":
        return [ContrastiveCase(pairs=pairs, dtype="float32") for pairs in (1024, 4096)]
    return [
        ContrastiveCase(pairs=1024, dtype="bfloat16"),
        ContrastiveCase(pairs=8192, dtype="bfloat16"),
        ContrastiveCase(pairs=8192, dtype="bfloat16", kind="sigmoid"),
        ContrastiveCase(pairs=8192, dtype="bfloat16", dim=512),
        ContrastiveCase(pairs=8192, dtype="float32"),
        ContrastiveCase(pairs=16384, dtype="bfloat16"),
    ]


def checks() -> list[ContrastiveCase]:
    """Both losses around the sides of tiles, and each family of widths."""
    sizes = [(2, 128), (63, 128), (129, 128), (1000, 128), (129, 20), (129, 300), (129, 512)]
    kinds: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    return [
        ContrastiveCase(pairs=pairs, dim=dim, kind=kind, dtype=dtype)
        for dtype in ("bfloat16", "float16", "float32")
        for kind in kinds
        for pairs, dim in sizes
    ]


SUITE = Suite(
    name="contrastive",
    cases=cases,
    checks=checks,
    make_inputs=make_inputs,
    plain=lambda case, inputs: build_plain(case, inputs)(),
    providers=(
        Provider("ours", build_ours),
        Provider("ours compiled", partial(build_ours, compiled=True)),
        Provider("plain", build_plain),
        Provider("plain compiled", partial(build_plain, compiled=True)),
        Provider("open_clip", build_open_clip),
        Provider("open_clip compiled", partial(build_open_clip, compiled=True)),
    ),
    baseline="ours",
)

if __name__ == "__main__":
    main([SUITE], "The contrastive losses without a tensor of all pairs")
