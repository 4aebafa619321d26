"""Drawing a token a row from logits: `python -m benchmarks.sampling`.

Guidance, temperature, top-k, top-p, min-p and the draw, as chains of PyTorch operations write them,
beside one launch. The gate wants the definition's tokens, those that a CPU draws, without a single
exception; so the chains are given the definition's noise, made beforehand, in place of a generator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Provider, Suite, Tensors, Work
from benchmarks.run import main
from musiclm_kernels import reference, sample_logits
from musiclm_kernels.philox import uniform

FILTERS: dict[str, Any] = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
GUIDANCE = 3.0
STEP = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingCase(Case):
    """`rows` rows and their twins without the condition."""

    op: ClassVar[str] = "sampling"
    rows: int
    tokens: int = 1024
    filtered: bool = True

    @property
    def name(self) -> str:
        filters = "all filters" if self.filtered else "unfiltered"
        return f"B={self.rows} V={self.tokens} {self.dtype}, guided, {filters}"

    @property
    def settings(self) -> dict[str, Any]:
        return FILTERS if self.filtered else {"temperature": FILTERS["temperature"]}

    def work(self) -> Work:
        """Ten rounds of Philox a token are what is computed; the logits are what is read."""
        elements = self.rows * self.tokens
        return Work(60 * elements, 2 * elements * self.torch_dtype.itemsize)


def make_inputs(case: SamplingCase, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(case.rows)
    rows = 3 * torch.randn(2, case.rows, case.tokens, generator=generator)
    logits, unconditional = rows.to(device, case.torch_dtype)
    seeds = torch.arange(case.rows, device=device)
    return {"logits": logits, "unconditional": unconditional, "seeds": seeds}


def plain(case: SamplingCase, inputs: Tensors) -> Tensors:
    """The definition, on the values of the case's precision: what all devices must draw."""
    logits, base = (inputs[name].float().cpu() for name in ("logits", "unconditional"))
    tokens = reference.sample_logits(
        logits, unconditional=base, guidance_scale=GUIDANCE, seeds=inputs["seeds"].cpu(),
        step=STEP, **case.settings,
    )  # fmt: skip
    return {"tokens": tokens.to(inputs["logits"].device)}


def build_ours(case: SamplingCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    step = torch.tensor(STEP, device=inputs["logits"].device)

    def draw(logits: Tensor, unconditional: Tensor, seeds: Tensor) -> Tensor:
        return sample_logits(
            logits, unconditional=unconditional, guidance_scale=GUIDANCE, seeds=seeds, step=step,
            **case.settings,
        )  # fmt: skip

    return _as_call(inputs, draw, compiled)


def filtered_logits(case: SamplingCase, logits: Tensor, unconditional: Tensor) -> Tensor:
    """What decoding loops write: a topk, a sort, a softmax, a cumulative sum and a scatter."""
    logits, base = logits.float(), unconditional.float()
    logits = (base + GUIDANCE * (logits - base)) / FILTERS["temperature"]
    if case.filtered:
        kth = logits.topk(min(FILTERS["top_k"], case.tokens)).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
        ranked, order = logits.sort(descending=True)
        probabilities = ranked.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= FILTERS["top_p"]
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        probabilities = logits.softmax(-1)
        floor = FILTERS["min_p"] * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    return logits


def build_chain(case: SamplingCase, inputs: Tensors, *, compiled: bool = False) -> Call:
    columns = STEP * case.tokens + torch.arange(case.tokens, device=inputs["seeds"].device)
    noise = -(-uniform(inputs["seeds"][:, None], columns).clamp_min(2.0**-33).log()).log()

    def draw(logits: Tensor, unconditional: Tensor, seeds: Tensor) -> Tensor:
        return (filtered_logits(case, logits, unconditional) + noise).argmax(-1)

    return _as_call(inputs, draw, compiled)


def _as_call(inputs: Tensors, draw: Callable[..., Tensor], compiled: bool) -> Call:
    function = torch.compile(draw, dynamic=False) if compiled else draw
    arguments = inputs["logits"], inputs["unconditional"], inputs["seeds"]
    return lambda: {"tokens": function(*arguments)}


def cases(device_type: str) -> list[SamplingCase]:
    if device_type != "cuda":
        return [SamplingCase(rows=rows, dtype="float32") for rows in (1, 16)]
    return [
        *(SamplingCase(rows=rows, dtype="float32") for rows in (1, 16, 256)),
        SamplingCase(rows=16, dtype="float32", filtered=False),
        SamplingCase(rows=16, dtype="bfloat16", tokens=8192),
    ]


def checks() -> list[SamplingCase]:
    """Every size of tile, many rows: a token on the GPU that is not the CPU's is an error."""
    sizes = (2, 500, 1024, 1025, 4096, 8192, 16384)
    return [
        SamplingCase(rows=1024, tokens=tokens, filtered=filtered, dtype=dtype)
        for tokens, filtered, dtype in product(sizes, (True, False), ("float32", "bfloat16"))
    ]


SUITE = Suite(
    name="sampling",
    cases=cases,
    checks=checks,
    make_inputs=make_inputs,
    plain=plain,
    providers=(
        Provider("ours", build_ours),
        Provider("ours compiled", partial(build_ours, compiled=True)),
        Provider("chain", build_chain),
        Provider("chain compiled", partial(build_chain, compiled=True)),
    ),
    baseline="ours",
)

if __name__ == "__main__":
    main([SUITE], "a token a row from logits, against chains of PyTorch's operations")
