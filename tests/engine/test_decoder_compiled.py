"""A step compiled for the CPU: the tokens of the eager one, from one compilation."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from musiclm_engine.audiolm import CoarseTransformer
from musiclm_engine.generation import (
    DecodeStep,
    Decoding,
    Sampling,
    decoder_from_stage,
    derive_seeds,
    step,
)
from musiclm_engine.generation.frozen import Frozen
from musiclm_engine.generation.stage_steps import StageSteps


@pytest.fixture(scope="module")
def stage(with_opinions):
    torch.manual_seed(0)
    return with_opinions(
        CoarseTransformer(
            num_semantic_tokens=12, codebook_size=10, num_coarse_quantizers=2,
            conditioning_size=8, conditioning_length=2, dim=32, depth=1, heads=2, dim_head=16,
            max_frames=64,
        )
    ).eval()  # fmt: skip


def run(stage, frames, *, compiled, weights=None, **options):
    conditioning = torch.tensor([[1, 2], [3, 4], [8, 8], [8, 8]])
    context = torch.arange(frames).remainder(12).expand(4, -1)[..., None]
    decode = DecodeStep(
        decoder_from_stage(stage, **(weights or {})), rows=2, compiled=compiled,
        length=stage.sequence_length(frames, frames), sampling=Sampling(top_k=8, guidance=2.0),
        **options,
    )  # fmt: skip
    with torch.inference_mode():
        prefix = torch.zeros(4, 0, 2, dtype=torch.int64)
        x = stage.prefill(conditioning, context, prefix, decode.cache.append)
        query_codes, key_codes = stage.codes(frames, frames)
    decode.begin(
        x, seeds=derive_seeds(0, count=2), position=stage.sequence_length(frames, 0) - 1,
        query_codes=query_codes, key_codes=key_codes,
    )  # fmt: skip
    for _ in range(2 * frames):
        decode()
    return decode.tokens


def test_one_compilation_draws_the_eager_tokens(stage, monkeypatch):
    """Through several blocks of the cache, and to its end."""
    monkeypatch.setattr(step, "COMPILED_BLOCK", 16)
    counter = CompileCounterWithBackend("inductor")
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_with(f, **options, backend=counter)
    )
    torch._dynamo.reset()
    tokens = run(stage, 12, compiled=True)
    assert counter.frame_count == 1
    assert torch.equal(tokens, run(stage, 12, compiled=False))
    assert len(tokens.unique()) > 4


@pytest.fixture
def traced_only(monkeypatch):
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_with(f, **options, backend="aot_eager")
    )
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"weights": {"dtype": torch.bfloat16}},
        {"weights": {"weight_dtype": torch.int8}, "cache_dtype": torch.float8_e4m3fn},
        {"slots": 9, "eos": 3},
    ],
    ids=str,
)
def test_every_precision_traces(stage, options, traced_only):
    wanted = run(stage, 6, compiled=False, **options)
    assert torch.equal(run(stage, 6, compiled=True, **options), wanted)


def test_any_number_of_functions_is_compiled(traced_only):
    """All are compilations of one method, and a compiler stops at eight of those by default."""

    def add(weight, x):
        x.add_(weight)

    with torch.inference_mode():
        for number in range(10):
            x = torch.zeros(2 + number)
            function = Frozen(add, torch.full((2 + number,), 1.0 + number))
            function(x)
            function(x)
            assert (x == 2 + 2 * number).all()


def test_a_compiled_step_is_kept(stage, traced_only):
    steps, compiled = StageSteps(), []
    for _ in range(2):
        with steps.borrow(
            stage, rows=2, length=40, sampling=Sampling(), decoding=Decoding(compiled=True)
        ) as borrowed:
            compiled.append(borrowed)
    assert compiled[0] is compiled[1]


def test_a_compiled_step_outlives_eager_ones(stage):
    steps, settings = StageSteps(), {"rows": 2, "length": 40, "sampling": Sampling()}
    with steps.borrow(stage, decoding=Decoding(compiled=True), **settings) as compiled:
        pass
    with steps.borrow(stage, decoding=Decoding(), **settings) as eager:
        assert eager is not compiled
    with steps.borrow(stage, decoding=Decoding(compiled=True), **settings) as again:
        assert again is compiled


def test_all_stages_compile_within_a_generation(tiny_musiclm, traced_only):
    """Under inference mode, over windows of unequal length, each stage once."""
    audiolm = copy.deepcopy(tiny_musiclm.audiolm)
    arguments = {"seconds": 0.6, "seeds": derive_seeds(0, count=2)}
    conditioning = torch.tensor([[1, 2], [3, 4]])
    wanted = audiolm.generate(conditioning, **arguments).tokens
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        found = audiolm.generate(conditioning, decoding=Decoding(compiled=True), **arguments).tokens
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
