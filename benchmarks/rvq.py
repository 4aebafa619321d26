"""Residual vector quantisation: `python -m benchmarks.rvq`.

The vectors are such that there is one right answer: at every level the nearest code is nearer than
the next by more than what the precision of the case leaves open. So codes are compared, not errors.

"fast" multiplies in fp16 on a GPU. vector-quantize-pytorch multiplies float32 as PyTorch is set to: it
is timed as it comes, and with TF32, the quickest it can be set to.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.case import Call, CannotRun, Case, Provider, Suite, Tensors, Work
from benchmarks.peers import import_peer
from benchmarks.run import main
from musiclm_kernels import rvq_encode

# Of |c| (|c| + 2 |r|), between the two nearest codes' squared distances. Several times the largest
# error that fp32, and fp16 factors, make among the distances of a case.
CLEAR = {"exact": 3e-6, "fast": 5e-4}
DRAWN = 4096  # vectors at a time, of which the clear ones are kept


@dataclass(frozen=True, kw_only=True)
class RvqCase(Case):
    """Encoding of normal vectors, whose codebooks shrink level by level as trained ones do.

    The codebooks are float32; dtype is what a mode may round the factors of a product to.
    """

    op: ClassVar[str] = "rvq"
    mode: Literal["exact", "fast"]
    rows: int
    levels: int = 12
    codes: int = 1024
    width: int = 128
    x_dtype: str = "float32"

    @property
    def name(self) -> str:
        shape = f"N={self.rows} Q={self.levels} K={self.codes} D={self.width}"
        return f"{shape} {self.x_dtype}, {self.mode}"

    def work(self) -> Work:
        products = 2 * self.rows * self.levels * self.codes * self.width
        x_bytes = getattr(torch, self.x_dtype).itemsize
        read = self.width * (x_bytes * self.rows + 4 * self.levels * self.codes)
        written = self.rows * (4 * self.width + 8 * self.levels)
        return Work(products, read + written)


def make_inputs(case: RvqCase, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(case.rows + case.width)
    codebooks = torch.randn(case.levels, case.codes, case.width, generator=generator)
    codebooks *= 0.9 ** torch.arange(case.levels)[:, None, None]
    codebooks = codebooks.to(device)
    clear: list[Tensor] = []
    while sum(map(len, clear)) < case.rows:
        x = torch.randn(DRAWN, case.width, generator=generator)
        x = x.to(device, getattr(torch, case.x_dtype))
        clear.append(x[_are_clear(x.double(), codebooks.double(), CLEAR[case.mode])])
    return {"x": torch.cat(clear)[: case.rows].contiguous(), "codebooks": codebooks}


def _are_clear(residual: Tensor, codebooks: Tensor, share: float) -> Tensor:
    clear = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
    for book in codebooks:
        two = _distances(residual, book).topk(2, largest=False)
        longest = book.norm(dim=1).amax()
        unclear = share * longest * (longest + 2 * residual.norm(dim=1))
        clear &= two.values[:, 1] - two.values[:, 0] > unclear
        residual = residual - book[two.indices[:, 0]]
    return clear


def _distances(residual: Tensor, book: Tensor) -> Tensor:
    """[N, K] squared, less what the vector itself adds to all of its own."""
    return torch.addmm(book.square().sum(1), residual, book.T, alpha=-2)


def plain_rvq(case: RvqCase, inputs: Tensors) -> Tensors:
    """Level by level, with the distances to all codes."""
    residual = inputs["x"].to(inputs["codebooks"].dtype)
    quantized = torch.zeros_like(residual)
    codes = []
    for book in inputs["codebooks"]:
        codes.append(_distances(residual, book).argmin(1))
        residual = residual - book[codes[-1]]
        quantized = quantized + book[codes[-1]]
    return {"codes": torch.stack(codes, 1), "quantized": quantized}


def build_ours(case: RvqCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    def encode(x: Tensor, codebooks: Tensor) -> Tensors:
        codes, quantized = rvq_encode(x, codebooks, mode=case.mode)
        return {"codes": codes, "quantized": quantized}

    function = torch.compile(encode, dynamic=False, fullgraph=True) if compiled else encode
    return lambda: function(inputs["x"], inputs["codebooks"])


def build_vector_quantize_pytorch(
    case: RvqCase, inputs: Tensors, *, compiled: bool = False, tf32: bool = False
) -> Call:
    """Its ResidualVQ in eval mode over the same codebooks."""
    if tf32 and not inputs["x"].is_cuda:
        raise CannotRun("TF32 is of GPUs")
    module = import_peer("vector_quantize_pytorch").ResidualVQ(
        dim=case.width, num_quantizers=case.levels, codebook_size=case.codes
    )
    module = module.to(inputs["x"].device).eval()
    for layer, book in zip(module.layers, inputs["codebooks"], strict=True):
        layer._codebook.embed.data.copy_(book[None])
    function = torch.compile(module, dynamic=False) if compiled else module

    def call() -> Tensors:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else before)
        with torch.no_grad():
            quantized, codes, _losses = function(inputs["x"][None])
        torch.set_float32_matmul_precision(before)
        return {"codes": codes[0], "quantized": quantized[0]}

    return call


def _both(rows: int, **shape: Any) -> list[RvqCase]:
    return [
        RvqCase(rows=rows, mode="exact", dtype="float32", **shape),
        RvqCase(rows=rows, mode="fast", dtype="float16", **shape),
    ]


def cases(device_type: str) -> list[RvqCase]:
    if device_type != "cuda":
        return _both(4096)
    return [*_both(16000), *_both(16000, levels=8), *_both(16000, width=512), *_both(64)]


def checks() -> list[RvqCase]:
    """Each family of tiles, and what lies around their sides."""
    widths = [8, 20, 64, 100, 128, 200, 256, 300, 512]
    cases = [c for width in widths for c in _both(129, levels=3, codes=1000, width=width)]
    for rows in (1, 64, 8193):
        cases += _both(rows, levels=3)
    for x_dtype in ("float16", "bfloat16"):
        cases += _both(129, levels=3, x_dtype=x_dtype)
    return [*cases, *_both(129, levels=32, codes=65), *_both(129, levels=3, codes=2)]


SUITE = Suite(
    name="rvq",
    cases=cases,
    make_inputs=make_inputs,
    plain=plain_rvq,
    providers=(
        Provider("ours", build_ours),
        Provider("ours compiled", partial(build_ours, compiled=True)),
        Provider("vector-quantize-pytorch", build_vector_quantize_pytorch),
        Provider("vector-quantize-pytorch tf32", partial(build_vector_quantize_pytorch, tf32=True)),
        Provider(
            "vector-quantize-pytorch compiled",
            partial(build_vector_quantize_pytorch, compiled=True),
        ),
    ),
    baseline="ours",
    checks=checks,
)

if __name__ == "__main__":
    main([SUITE], "residual vector quantisation against vector-quantize-pytorch's")
