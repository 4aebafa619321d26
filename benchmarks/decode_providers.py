"""Who runs a decode step: each builds it, checks what it computes, and returns what is timed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.case import CannotRun, Tensors
from benchmarks.decode_models import VOCABULARY
from benchmarks.decode_peers import (
    AudioLMPytorch,
    LlamaModel,
    StaticCacheModel,
    StepOfModel,
    compiled,
)
from benchmarks.decode_setup import Measured, Setup, agreement, newest
from benchmarks.gate import Verdict, judge
from musiclm_engine.generation import DecodeStep, Sampling
from musiclm_engine.generation.cache import CachedLayer
from musiclm_engine.generation.ops import DEFINITIONS, KERNELS

TOP_K = 102  # a tenth of the vocabulary, audiolm-pytorch's choice


def build_ours(
    setup: Setup, *, weight_dtype: torch.dtype | None = None, fast: bool = True
) -> Measured:
    """Compiled on a CPU, a graph on a GPU, unless not `fast`."""
    case, dtype = setup.case, setup.case.torch_dtype
    decoder, memory = setup.decoder(dtype, weight_dtype)
    step = DecodeStep(
        decoder, rows=case.batch, length=setup.slots, memory=memory, dtype=dtype,
        sampling=Sampling(top_k=TOP_K, guidance=case.guidance or 1.0),
        compiled=fast and setup.device.type == "cpu", graph=fast,
    )  # fmt: skip
    codes = torch.arange(setup.slots, dtype=torch.int32, device=setup.device)

    def begin() -> None:
        step.begin(
            setup.input_of(decoder), seeds=torch.arange(case.batch, device=setup.device),
            position=case.context, query_codes=codes[None], key_codes=codes[None],
        )  # fmt: skip

    setup.fill(step.cache.layers)
    begin()
    step()
    found = newest(step.cache.layers, case.context)
    truth = setup.truth(decoder, memory)
    plain = setup.yardstick(decoder, memory)
    logits = setup.results(decoder, memory, dtype, KERNELS)["logits"]
    verdict = judge({**found, "logits": logits}, truth, plain)
    begin()
    return Measured(
        step, verdict, setup.num_bytes(decoder, dtype),
        agreement(logits, setup.whole_truth["logits"]),
    )  # fmt: skip


def build_audiolm_pytorch(setup: Setup) -> Measured:
    case = setup.case
    if case.model != "audiolm":
        raise CannotRun("another architecture")
    if case.guidance is None:
        raise CannotRun("timed with guidance")
    peer = AudioLMPytorch(setup.state, case.dim, case.depth, case.heads, setup.text)
    # [2, layers, 2, B, N, d]
    stacked = torch.stack([torch.stack([k[:, 0], v[:, 0]]) for k, v in setup.filled])
    cache = torch.stack(stacked.chunk(2, dim=2))
    history = torch.zeros(case.batch, case.context, VOCABULARY + 1, device=setup.device)

    def step() -> None:
        new, _ = peer.logits(setup.ids, cache, case.guidance or 1.0)
        peer.draw(setup.ids, torch.cat((history, new), dim=-2))

    with torch.inference_mode():
        logits = peer.logits(setup.ids, cache, case.guidance)[0][:, -1]
    decoder, _ = setup.decoder(torch.float32)
    return Measured(
        torch.inference_mode()(step),
        judge({"logits": logits}, *_logits(setup)),
        setup.num_bytes(decoder, torch.float32),
        agreement(logits, setup.whole_truth["logits"]),
    )


def _logits(setup: Setup) -> tuple[Tensors, Tensors]:
    """The whole truth's and, as the yardstick, those of plain PyTorch in float32."""
    decoder, memory = setup.decoder(torch.float32)
    plain = setup.results(decoder, memory, torch.float32, DEFINITIONS)
    return {"logits": setup.whole_truth["logits"]}, {"logits": plain["logits"]}


def build_static_cache(setup: Setup) -> Measured:
    """gpt-fast's way, compiled as ours is, with as many slots."""
    case, dtype = setup.case, setup.case.torch_dtype
    if case.model != "paper":
        raise CannotRun("another architecture")
    decoder, _ = setup.decoder(torch.float32)
    model = StaticCacheModel(decoder, case.rows, setup.slots, dtype).eval()
    layers = tuple(CachedLayer(*cache, None, None) for cache in model.caches())
    setup.fill(layers)
    step = _step_of(setup, model)
    with torch.inference_mode():
        logits = setup.guided(model(step.tokens, step.position))
    run = compiled(step)
    for _, values in model.caches():
        values[:, :, case.context] = 0  # what the model left there is for `run` to write again
    run()
    found = {**newest(layers, case.context), "logits": logits}
    narrow, _ = setup.decoder(dtype)
    return Measured(
        run, judge(found, setup.truth(narrow, None), setup.yardstick(narrow, None)),
        setup.num_bytes(narrow, dtype), agreement(logits, setup.whole_truth["logits"]),
    )  # fmt: skip


def build_llama(setup: Setup) -> Measured:
    """transformers' way, compiled as ours is, with as many slots."""
    case, dtype = setup.case, setup.case.torch_dtype
    if case.model != "paper":
        raise CannotRun("another architecture")
    model = LlamaModel(case.dim, case.depth, case.heads, setup.slots, dtype, setup.device).eval()
    step = _step_of(setup, model)
    with torch.inference_mode():
        finite = bool(model(step.tokens, step.position).isfinite().all())
    narrow, _ = setup.decoder(dtype)
    return Measured(
        compiled(step), Verdict({}, "" if finite else "logits are not finite"),
        setup.num_bytes(narrow, dtype), {"answers": "a Llama of the same size"},
    )  # fmt: skip


def _step_of(setup: Setup, model: nn.Module) -> StepOfModel:
    case = setup.case
    tokens = setup.ids[:, -1]
    tokens = torch.cat([tokens, tokens])[: case.rows]
    position = torch.tensor([case.context], device=setup.device)
    return StepOfModel(model, tokens, position, case.guidance, TOP_K).eval()


PROVIDERS: dict[str, Callable[[Setup], Measured]] = {
    "ours": build_ours,
    "ours int8": partial(build_ours, weight_dtype=torch.int8),
    "ours float8": partial(build_ours, weight_dtype=torch.float8_e4m3fn),
    "ours eager": partial(build_ours, fast=False),
    "compiled static cache": build_static_cache,
    "transformers static cache": build_llama,
    "audiolm-pytorch": build_audiolm_pytorch,
}
