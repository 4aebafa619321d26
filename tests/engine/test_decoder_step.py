"""A decode step against the whole sequence at once, and what one promises about its buffers."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_engine.audiolm import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_engine.generation import Sampling, derive_seeds
from musiclm_engine.generation.cache import KVCache
from musiclm_engine.generation.decoder import CrossAttention, Memory, Weight, step_layers
from musiclm_engine.generation.from_stage import decoder_from_stage
from musiclm_engine.generation.ops import DEFINITIONS, KERNELS
from musiclm_engine.generation.step import DecodeStep

WIDTH = {"dim": 32, "depth": 3, "heads": 2, "dim_head": 16, "max_frames": 64}
CONDITIONING = {"conditioning_size": 8, "conditioning_length": 3}
STAGES = {
    "semantic": (SemanticTransformer, {"num_semantic_tokens": 12}),
    "gated": (SemanticTransformer, {"num_semantic_tokens": 12, "ff_gated": True}),
    "with beats": (SemanticTransformer, {"num_semantic_tokens": 12, "frame_rate_hz": 25.0}),
    "coarse": (
        CoarseTransformer,
        {
            "num_semantic_tokens": 12,
            "codebook_size": 10,
            "num_coarse_quantizers": 2,
            "frames_per_semantic": 2,
        },
    ),
    "fine": (
        FineTransformer,
        {"codebook_size": 10, "num_coarse_quantizers": 2, "num_fine_quantizers": 3},
    ),
}
FRAMES = 8
B = 3


def build(name, with_opinions, **changes):
    torch.manual_seed(0)
    kind, own = STAGES[name]
    return with_opinions(kind(**{**own, **CONDITIONING, **WIDTH, **changes})).eval()


@pytest.fixture(scope="module", params=STAGES)
def stage(request, with_opinions):
    return build(request.param, with_opinions)


@pytest.fixture(scope="module")
def semantic(with_opinions):
    return build("semantic", with_opinions)


def inputs(stage, frames=FRAMES):
    generator = torch.Generator().manual_seed(1)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    context = None
    if stage.context_levels:
        context = draw(stage.context_size, B, frames // stage.context_stride, stage.context_levels)
    conditioning = draw(stage.conditioning_size, B, stage.conditioning_length)
    return conditioning, context, draw(stage.target_size, B, frames, stage.target_levels)


def tempo_of(stage, rows):
    """Another for each of B rows, and the same again for rows beyond them."""
    return None if stage.clock is None else torch.arange(rows) % B * 30


class Recorder:
    """Ops that note the logits of each step and draw the tokens they are told."""

    def __init__(self, tokens, ops):
        self.tokens = tokens
        self.logits = []
        self.ops = ops._replace(sample_next_token=self.sample)

    def sample(
        self, x, norm_weight, norm_bias, head, embedding, *, head_scale, step, seeds, **options
    ):
        level = int(step) % len(head)
        hidden = torch.nn.functional.layer_norm(
            x, x.shape[-1:], norm_weight.to(x.dtype), None, eps=1e-5
        )
        scale = 1.0 if head_scale is None else head_scale[level]
        self.logits.append(hidden @ head[level].to(x.dtype).T * scale)
        drawn = self.tokens[:, int(step)]
        x.copy_(embedding[level][drawn].repeat(len(x) // len(drawn), 1))
        return drawn


def start(stage, context, conditioning, prefix, frames, *, weights=None, seed=0, **options):
    """A step that has taken in all that is given."""
    context_frames = 0 if context is None else context.shape[1]
    length = stage.sequence_length(context_frames, frames)
    rows = len(prefix) // (2 if options["sampling"].guidance != 1 else 1)
    seeds = derive_seeds(seed, count=rows)
    step = DecodeStep(
        decoder_from_stage(stage, **(weights or {})), rows=rows, length=length, **options
    )
    for layer in step.cache.layers:  # what is not filled must not be read
        for part in layer[:2]:
            part.copy_(torch.full_like(part, math.nan, dtype=torch.float32).to(part.dtype))
    with torch.inference_mode():
        tempo = tempo_of(stage, len(prefix))
        x = stage.prefill(conditioning, context, prefix, step.cache.append, tempo)
        query_codes, key_codes = stage.codes(context_frames, frames, tempo)
    given = prefix.shape[1]
    step.begin(
        x,
        seeds=seeds,
        position=stage.sequence_length(context_frames, given) - 1,
        number=given * stage.target_levels,
        query_codes=query_codes,
        key_codes=key_codes,
    )
    return step


def stepwise_logits(stage, given=0, ops=KERNELS, frames=FRAMES, **options):
    conditioning, context, target = inputs(stage, frames)
    recorder = Recorder(target.flatten(1), ops)
    step = start(
        stage, context, conditioning, target[:, :given], frames,
        sampling=Sampling(), ops=recorder.ops, **options,
    )  # fmt: skip
    for _ in range((frames - given) * stage.target_levels):
        step()
    return torch.stack(recorder.logits, dim=1)


def forward_logits(stage, given=0, frames=FRAMES):
    with torch.no_grad():
        logits = stage(*inputs(stage, frames), tempo_of(stage, B))
    return logits.flatten(1, 2)[:, given * stage.target_levels :]


# The same logits as the whole sequence at once.


@pytest.mark.parametrize("given", [0, 1, 5])
def test_stepwise_is_forward(stage, given):
    torch.testing.assert_close(
        stepwise_logits(stage, given), forward_logits(stage, given), rtol=1e-4, atol=1e-4
    )


def test_stepwise_by_the_definitions_is_forward_in_float64(stage):
    stage = type(stage).from_config(stage.config).eval().requires_grad_(False).double()
    found = stepwise_logits(stage, 2, ops=DEFINITIONS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, forward_logits(stage, 2), rtol=1e-6, atol=1e-6)


def test_a_stage_without_conditioning_begins_with_an_empty_cache(with_opinions):
    stage = build("semantic", with_opinions, conditioning_length=0)
    torch.testing.assert_close(stepwise_logits(stage), forward_logits(stage), rtol=1e-4, atol=1e-4)


def test_twins_see_no_condition(stage):
    conditioning, context, target = inputs(stage)
    recorder = Recorder(target.flatten(1), KERNELS)
    nothing = torch.full_like(conditioning, stage.null)
    step = start(
        stage,
        None if context is None else context.repeat(2, 1, 1),
        torch.cat([conditioning, nothing]),
        target[:, :1].repeat(2, 1, 1),
        FRAMES,
        sampling=Sampling(guidance=2.0),
        ops=recorder.ops,
    )
    for _ in range((FRAMES - 1) * stage.target_levels):
        step()
    found = torch.stack(recorder.logits, dim=1)
    with torch.no_grad():
        told, untold = (
            stage(given, context, target, tempo_of(stage, B)).flatten(1, 2)[
                :, stage.target_levels :
            ]
            for given in (conditioning, nothing)
        )
    torch.testing.assert_close(found, torch.cat([told, untold]), rtol=1e-4, atol=1e-4)


def windowed_forward(stage, window, frames):
    """The stage over a whole sequence, written out: a token sees the `window` newest alone."""
    conditioning, context, target = inputs(stage, frames)
    tempo = tempo_of(stage, B)
    x = stage.embed(conditioning, context, target, tempo)[:, :-1]
    q_codes, k_codes = stage.codes(0 if context is None else context.shape[1], frames, tempo)
    N, heads = x.shape[1], stage.transformer.heads
    table = stage.position.table()
    index = q_codes[:, :N, None].long() - k_codes[:, None, :N] + stage.position.offset
    bias = table[:, index.clamp(0, table.shape[1] - 1)].transpose(0, 1)
    age = torch.arange(N)[:, None] - torch.arange(N)
    bias = bias.masked_fill((age < 0) | (age >= window), -math.inf)
    for layer in stage.transformer.layers:
        attention = layer.attention
        qkv = attention.to_qkv(attention.norm(x)).view(B, N, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
        x = x + attention.to_out((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(x)
    hidden = stage.transformer.norm(x)[:, -frames * stage.target_levels :]
    levels = torch.arange(hidden.shape[1]) % stage.target_levels
    return torch.einsum("bnd,nkd->bnk", hidden, stage.logit_weights[levels])


@torch.no_grad()
@pytest.mark.parametrize("slots", [5, 7])
@pytest.mark.parametrize("name", ["semantic", "with beats"])
def test_a_ring_is_a_window(with_opinions, name, slots):
    """Twenty frames through a cache of a few slots: each token sees that many, itself included."""
    stage = build(name, with_opinions)
    found = stepwise_logits(stage, frames=20, slots=slots)
    wanted = windowed_forward(stage, slots, 20)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, forward_logits(stage, frames=20), atol=1e-2)


@torch.no_grad()
def test_the_window_of_everything_is_forward(stage):
    torch.testing.assert_close(
        windowed_forward(stage, 1000, FRAMES), forward_logits(stage), rtol=1e-4, atol=1e-4
    )


# Fewer bits. Each of the 13 products of three layers and the head is off by about so much of its
# spread, independently; the layers that follow may treble that.

PRODUCTS = 13
INT8 = 0.006  # 1 / 127 / sqrt(12), of weights whose largest in a row is 2.5 times their spread
FLOAT8 = 0.026  # 2^-3 / sqrt(12), less as a value lies anywhere in its binade
BFLOAT16 = 3**0.5 * FLOAT8 / 16  # weights, activations and cache are rounded


@pytest.mark.parametrize(
    ("options", "error_of_a_product"),
    [
        ({"weights": {"dtype": torch.bfloat16}}, BFLOAT16),
        ({"weights": {"weight_dtype": torch.int8}}, INT8),
        ({"weights": {"weight_dtype": torch.float8_e4m3fn}}, FLOAT8),
        ({"cache_dtype": torch.float8_e4m3fn}, FLOAT8),
    ],
)
def test_fewer_bits_err_little(stage, options, error_of_a_product):
    wanted = forward_logits(stage, 2)
    error = stepwise_logits(stage, 2, **options) - wanted
    budget = 3 * PRODUCTS**0.5 * error_of_a_product
    assert 0 < error.square().mean().sqrt() < budget * wanted.std()


def test_weights_in_their_own_precision_are_shared(semantic):
    decoder = decoder_from_stage(semantic)
    weight = semantic.transformer.layers[1].feed_forward.expand.weight
    assert decoder.layers[1].feed_forward.up.values.data_ptr() == weight.data_ptr()
    assert decoder.head.data_ptr() == semantic.logit_weights.data_ptr()


# Drawing.


def draw(stage, count=6, rows=slice(None), given=0, **options):
    conditioning, context, target = inputs(stage)
    options.setdefault("sampling", Sampling(top_k=8))
    step = start(
        stage,
        None if context is None else context[rows],
        conditioning[rows],
        target[rows, :given],
        FRAMES,
        **options,
    )
    for _ in range(count):
        step()
    return step.tokens


def test_the_definitions_draw_the_same_tokens(stage):
    tokens = draw(stage)
    assert tokens.shape == (B, 6) and len(tokens.unique()) > 3
    assert torch.equal(draw(stage, ops=DEFINITIONS), tokens)


def test_begin_forgets_what_was(stage):
    """Tokens, cache, seeds, and that rows had ended."""
    conditioning, context, target = inputs(stage)
    eos = int(draw(stage)[0, 3])
    options = {"sampling": Sampling(top_k=8), "eos": eos}
    fresh = start(stage, context, conditioning, target[:, :1], FRAMES, **options)
    used = start(stage, context, conditioning.flip(0), target[:, 1:2], FRAMES, seed=1, **options)
    for _ in range(5):
        used()
    used.buffers.finished.fill_(True)
    with torch.inference_mode():
        tempo = tempo_of(stage, B)
        x = stage.prefill(conditioning, context, target[:, :1], used.cache.append, tempo)
        context_frames = 0 if context is None else context.shape[1]
        query_codes, key_codes = stage.codes(context_frames, FRAMES, tempo)
    used.begin(
        x,
        seeds=derive_seeds(0, count=B),
        position=stage.sequence_length(context_frames, 1) - 1,
        number=stage.target_levels,
        query_codes=query_codes,
        key_codes=key_codes,
    )
    for _ in range(5):
        assert torch.equal(used(), fresh())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_many_rows_draw_what_few_do(semantic, guidance):
    """Past the fused launch's rows the head is a library's product."""
    conditioning, _, target = inputs(semantic)
    options = {"sampling": Sampling(temperature=0.0, guidance=guidance)}

    def run(copies):
        told = conditioning.repeat(copies, 1)
        if guidance != 1.0:
            told = torch.cat([told, torch.full_like(told, semantic.null)])
        nothing = target[:1, :0].expand(len(told), 0, 1)
        step = start(semantic, None, told, nothing, FRAMES, **options)
        for _ in range(FRAMES):
            step()
        return step.tokens

    assert torch.equal(run(12), run(1).repeat(12, 1))


@pytest.mark.parametrize("copies", [1, 12])
def test_a_row_that_ends_stays_ended(semantic, copies):
    free = draw(semantic, FRAMES)
    eos = next(t for t in free[0].tolist() if not (free == t).any(1).all())  # not in every row
    end = free[0].tolist().index(eos)
    conditioning, _, target = inputs(semantic)
    step = start(
        semantic, None, conditioning.repeat(copies, 1), target[:1, :0].expand(copies * B, 0, 1),
        FRAMES, sampling=Sampling(top_k=8), eos=eos,
    )  # fmt: skip
    for _ in range(FRAMES):
        step()
    assert torch.equal(step.tokens[0, :end], free[0, :end])
    assert (step.tokens[0, end:] == eos).all()
    ended = (step.tokens == eos).any(1)
    assert torch.equal(step.buffers.finished, ended) and not ended.all()


# Buffers and launches.


def addresses(step):
    tensors = [t for t in step.buffers if isinstance(t, torch.Tensor)]
    tensors += [t for layer in step.cache.layers for t in layer if t is not None]
    return [t.data_ptr() for t in tensors]


def test_buffers_stay_where_they_are(stage):
    conditioning, context, target = inputs(stage)
    step = start(stage, context, conditioning, target[:, :1], FRAMES, sampling=Sampling())
    before = addresses(step)
    for _ in range(4):
        step()
    assert addresses(step) == before
    assert not step.buffers.counters.any()


class Launches(TorchDispatchMode):
    """Notes every op that writes a tensor, an old one or a new one: views write none."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        old = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        result = function(*arguments, **(options or {}))
        results = result if isinstance(result, tuple) else (result,)
        made = {t.untyped_storage().data_ptr() for t in results if isinstance(t, torch.Tensor)}
        if made - old or function._schema.is_mutable:
            self.names.append(function._schema.name)
        return result


def launches_of_layers(decoder, memory=None):
    cache = KVCache.empty(
        layers=3, batch=B, heads=2, slots=16, dim_head=16, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    x, q_code = torch.randn(B, 32), torch.zeros(B, dtype=torch.int32)
    k_codes = torch.zeros(1, 16, dtype=torch.int32)
    with Launches() as launches, torch.inference_mode():
        step_layers(
            decoder, x, cache, memory=memory, q_code=q_code, k_codes=k_codes, dtype=torch.float32
        )
    return [name.removeprefix("musiclm::decode_") for name in launches.names]


def test_five_launches_a_layer(stage):
    launches = launches_of_layers(decoder_from_stage(stage))
    assert launches == ["qkv", "attention", "residual", "linear", "residual"] * 3


def test_three_more_where_a_layer_attends_to_a_memory(semantic):
    decoder = decoder_from_stage(semantic)
    layers = tuple(
        replace(
            layer,
            cross_attention=CrossAttention(
                norm=layer.attention.norm,
                q=Weight(torch.randn(32, 32)),
                out=Weight(torch.randn(32, 32)),
                null_kv=torch.randn(2, 2, 16),
            ),
        )
        for layer in decoder.layers
    )
    keys, mask = torch.randn(3, B, 2, 5, 16), torch.ones(B, 5, dtype=torch.bool)
    memory = Memory(keys, keys, mask, torch.full((B,), 5, dtype=torch.int32))
    own, others = ["qkv", "attention", "residual"], ["linear", "attention", "residual"]
    launches = launches_of_layers(replace(decoder, layers=layers), memory)
    assert launches == [*own, *others, "linear", "residual"] * 3


@pytest.mark.parametrize("slots", [None, 7])
def test_four_launches_a_step_beside_the_layers(semantic, slots):
    """The draw, its record, and two that set the clock; a ring also notes the slot's new code."""
    conditioning, _, target = inputs(semantic)
    step = start(
        semantic, None, conditioning, target[:, :1], FRAMES, sampling=Sampling(), slots=slots
    )
    with Launches() as launches:
        step()
    others = [name for name in launches.names if not name.startswith("musiclm::decode_")]
    noted = [] if slots is None else ["aten::to", "aten::index_copy_"]
    assert others == [
        *noted,
        "musiclm::sample_next_token",
        "aten::index_copy_",
        "aten::add_",
        "aten::index_select",
    ]


# Refusals.

NOTHING = torch.zeros(3, 2, 2, 1, 16)
MEMORY = Memory(NOTHING, NOTHING, torch.ones(2, 1, dtype=torch.bool), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0, wanted at least 1"),
        ({"length": 0}, "length is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"cache_dtype": torch.float16}, "cache_dtype is torch.float16, wanted torch.float32 or"),
        ({"eos": 12}, "eos is 12, wanted 0 to 11"),
        ({"memory": MEMORY}, "memory is given, wanted it for nothing but a decoder with cross"),
    ],
)
def test_steps_that_are_none_are_refused(semantic, options, message):
    options = {"rows": 2, "length": 9, "sampling": Sampling(), **options}
    with pytest.raises(ValueError, match=message):
        DecodeStep(decoder_from_stage(semantic), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 32)}, r"x is \(3, 32\), wanted \(2, 32\)"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds is \(3,\), wanted \(2,\)"),
        ({"position": 9}, "number is 0 and position 9, wanted number <= position < 9"),
        ({"number": 4}, "number is 4 and position 3"),
        ({"query_codes": None}, r"query_codes is None, wanted \(1, 9\)"),
        ({"key_codes": torch.zeros(2, 8)}, r"key_codes is \(2, 8\), wanted \(1, 9\) or \(2, 9\)"),
    ],
)
def test_beginnings_of_another_shape_are_refused(semantic, changes, message):
    step = DecodeStep(decoder_from_stage(semantic), rows=2, length=9, sampling=Sampling())
    codes = torch.zeros(1, 9, dtype=torch.int32)
    given = {
        "x": torch.zeros(2, 32),
        "seeds": torch.zeros(2, dtype=torch.int64),
        "position": 3,
        "query_codes": codes,
        "key_codes": codes,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        step.begin(given.pop("x"), **given)


def test_a_full_sequence_is_refused(semantic):
    step = DecodeStep(decoder_from_stage(semantic), rows=2, length=2, sampling=Sampling())
    with pytest.raises(RuntimeError, match="the sequence holds 2 tokens: begin another"):
        step()
    codes = torch.zeros(1, 2, dtype=torch.int32)
    step.begin(
        torch.zeros(2, 32), seeds=torch.zeros(2, dtype=torch.int64), position=0,
        query_codes=codes, key_codes=codes,
    )  # fmt: skip
    step(), step()
    with pytest.raises(RuntimeError, match="the sequence holds 2 tokens"):
        step()


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = f"{example}\nassert step.tokens.shape == (4, 50)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
