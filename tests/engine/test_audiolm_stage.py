"""A stage: causal, its cache the same as no cache, conditioning dropped in training alone."""

import math

import pytest
import torch

from musiclm_engine.audiolm import CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_engine.generation import Sampling
from musiclm_engine.generation.decode import decode_stage

WIDTH = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "max_frames": 64}
CONDITIONING = {"conditioning_size": 8, "conditioning_length": 3}
STAGES = {
    "semantic": (SemanticTransformer, {"num_semantic_tokens": 12}),
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
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # float32, of logits around 1


def build(name, **changes):
    torch.manual_seed(0)
    kind, own = STAGES[name]
    return kind(**own, **{**CONDITIONING, **WIDTH, **changes}).eval()


def inputs(stage, batch=3, frames=FRAMES):
    generator = torch.Generator().manual_seed(1)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    context = None
    if stage.context_levels:
        context = draw(
            stage.context_size, batch, frames // stage.context_stride, stage.context_levels
        )
    return (
        draw(stage.conditioning_size, batch, stage.conditioning_length),
        context,
        draw(stage.target_size, batch, frames, stage.target_levels),
    )


@pytest.fixture(scope="module", params=STAGES)
def stage(request, with_opinions):
    return with_opinions(build(request.param))


def flat(logits):
    return logits.flatten(1, 2)


@torch.no_grad()
def test_no_logits_depend_on_their_own_or_later_targets(stage):
    conditioning, context, target = inputs(stage)
    logits = flat(stage(conditioning, context, target))
    for index in range(FRAMES * stage.target_levels):
        changed = target.clone().flatten(1)
        changed[:, index] = (changed[:, index] + 1) % stage.target_size
        after = flat(stage(conditioning, context, changed.view_as(target)))
        torch.testing.assert_close(after[:, : index + 1], logits[:, : index + 1], rtol=0, atol=1e-6)
        rest = (after - logits)[:, index + 1 :].abs()
        assert rest.numel() == 0 or (rest.amax((0, 2)) > 1e-6).all(), index  # all later ones see it


@torch.no_grad()
def test_conditioning_and_all_context_are_seen_from_the_first_target_on(stage):
    conditioning, context, target = inputs(stage)
    logits = flat(stage(conditioning, context, target))
    for index in range(stage.conditioning_length):
        changed = conditioning.clone()
        changed[:, index] = (changed[:, index] + 1) % stage.conditioning_size
        after = flat(stage(changed, context, target))
        assert ((after - logits).abs().amax((0, 2)) > 1e-6).all()
    if context is None:
        return
    for frame in range(context.shape[1]):
        for level in range(stage.context_levels):
            changed = context.clone()
            changed[:, frame, level] = (changed[:, frame, level] + 1) % stage.context_size
            after = flat(stage(conditioning, changed, target))
            assert ((after - logits).abs().amax((0, 2)) > 1e-6).all(), (frame, level)


@torch.no_grad()
def test_rows_do_not_see_each_other(stage):
    conditioning, context, target = inputs(stage)
    logits = stage(conditioning, context, target)
    for row in range(len(target)):
        alone = stage(
            conditioning[row : row + 1],
            None if context is None else context[row : row + 1],
            target[row : row + 1],
        )
        torch.testing.assert_close(alone, logits[row : row + 1], **TOLERANCE)


@pytest.mark.parametrize("given", [0, 1, 5])
@torch.no_grad()
def test_prefill_tells_what_forward_computes(stage, given):
    """Keys and values of all given tokens but the last one, and that one's embedding."""
    conditioning, context, target = inputs(stage)
    stored = {}
    last = stage.prefill(
        conditioning,
        context,
        target[:, :given],
        lambda number, k, v: stored.update({number: (k, v)}),
    )
    whole = {}
    x = stage.embed(conditioning, context, target)
    context_frames = 0 if context is None else context.shape[1]
    q_codes, k_codes = stage.codes(context_frames, FRAMES)
    stage.transformer(
        x,
        table=stage.position.table(),
        offset=stage.position.offset,
        q_codes=q_codes,
        k_codes=k_codes,
        store=lambda number, k, v: whole.update({number: (k, v)}),
    )
    count = stage.sequence_length(context_frames, given) - 1
    assert torch.equal(last, x[:, count])
    assert list(stored) == list(whole) == [0, 1]
    for number, pair in stored.items():
        for part, wanted in zip(pair, whole[number], strict=True):
            assert part.shape == (3, 2, count, 8)
            torch.testing.assert_close(part, wanted[:, :, :count], **TOLERANCE)


def test_gated_feed_forward_multiplies_values_by_gates():
    stage = build("semantic", ff_gated=True)
    feed_forward = stage.transformer.layers[0].feed_forward
    assert feed_forward.expand.weight.shape == (2 * 4 * 16, 16)
    x = torch.randn(2, 5, 16)
    value, gate = feed_forward.expand(feed_forward.norm(x)).split(64, dim=-1)
    wanted = feed_forward.contract(value * torch.nn.functional.gelu(gate))
    torch.testing.assert_close(feed_forward(x), wanted)
    assert not torch.allclose(stage.loss(*inputs(stage)), build("semantic").loss(*inputs(stage)))


@torch.no_grad()
def test_context_is_found_at_its_own_moment(with_opinions):
    """Attention for "this very moment, one level down" leads from coarse frame t to context t / 2.

    This is what `context_stride` is for. Odd frames have no context of their own moment.
    """
    stage = with_opinions(build("coarse", depth=1))
    bias = stage.position.relative_attention_bias
    bias.fill_(-100.0)
    bias[:, stage.position.max_moments, stage.position.num_levels] = 100.0
    stage.position.outside_bias.fill_(-100.0)
    conditioning, context, target = inputs(stage)
    changed = context.clone()
    changed[:, 2] = (changed[:, 2] + 1) % stage.context_size
    difference = stage(conditioning, changed, target) - stage(conditioning, context, target)
    moved = difference.abs().amax((0, 3)) > 1e-6  # [frames, levels]
    assert moved[::2].nonzero().tolist() == [[2, 0]]


def test_conditioning_is_dropped_in_training_alone(with_opinions):
    stage = with_opinions(build("semantic", condition_drop_prob=1.0, dropout=0.0))
    conditioning, context, target = inputs(stage)
    nothing = torch.full_like(conditioning, stage.null)
    blind = stage.loss(nothing, context, target)
    seeing = stage.loss(conditioning, context, target)
    assert not torch.allclose(blind, seeing)
    torch.testing.assert_close(stage.train().loss(conditioning, context, target), blind)

    stage.condition_drop_prob = 0.0
    torch.testing.assert_close(stage.loss(conditioning, context, target), seeing)


@torch.no_grad()
def test_conditioning_is_dropped_by_row(with_opinions):
    stage = with_opinions(build("semantic", condition_drop_prob=0.5, dropout=0.0)).train()
    torch.manual_seed(0)
    told = []
    stage.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    stage.loss(*inputs(stage, batch=200))
    blind = (told[0] == stage.null).sum(1)
    assert set(blind.tolist()) == {0, stage.conditioning_length}  # whole rows
    assert 70 < (blind > 0).sum() < 130


def test_a_fresh_stage_knows_nothing():
    for name in STAGES:
        stage = build(name)
        loss = stage.loss(*inputs(stage))
        assert loss.shape == (stage.target_levels,)
        wanted = torch.full_like(loss, math.log(stage.target_size))
        torch.testing.assert_close(loss, wanted, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", STAGES)
def test_a_pattern_is_learnt_and_sung_back(name):
    stage = build(name, dropout=0.0, condition_drop_prob=0.0).train()
    conditioning, context, _ = inputs(stage, batch=2)
    levels = stage.target_levels
    pattern = torch.arange(2 * FRAMES * levels).view(2, FRAMES, levels) * 3 % 7
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-2)
    for _ in range(120):
        loss = stage.loss(conditioning, context, pattern).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert loss < 0.05
    sung = decode_stage(
        stage.eval(),
        conditioning=conditioning,
        context=context,
        prefix=pattern[:, :0],
        frames=FRAMES,
        seeds=torch.zeros(2, dtype=torch.int64),
        sampling=Sampling(temperature=0.0),
    )
    assert torch.equal(sung, pattern)


def test_config_rebuilds_a_stage(stage):
    again = type(stage).from_config(stage.config).eval()
    again.load_state_dict(stage.state_dict())
    given = inputs(stage)
    assert torch.equal(again(*given), stage(*given))
    assert again.config == stage.config


def test_a_stage_without_conditioning():
    stage = build("semantic", conditioning_length=0)
    conditioning, _, target = inputs(stage)
    assert stage(conditioning, None, target).shape == (3, FRAMES, 1, 12)


def change(tokens, value):
    tokens = tokens.clone()
    tokens.view(-1)[-1] = value
    return tokens


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda c, x, t: (c[:, :2], x, t), r"conditioning is \(3, 2\), wanted \[3, 3\]"),
        (lambda c, x, t: (c[:1], x, t), r"conditioning is \(1, 3\)"),
        (lambda c, x, t: (c, None, t), "context is missing, this stage has 1 levels"),
        (lambda c, x, t: (c, x[..., 0], t), r"context is \(3, 4\)"),
        (lambda c, x, t: (c, x.repeat(1, 1, 2), t), r"context is \(3, 4, 2\)"),
        (lambda c, x, t: (c, x, t[..., :1]), r"target is \(3, 8, 1\), wanted \[3, frames, 2\]"),
        # The tables of the levels lie one after another: these would read their neighbour's row.
        (lambda c, x, t: (change(c, 9), x, t), "conditioning spans . to 9, wanted 0 to 8"),
        (lambda c, x, t: (c, change(x, 12), t), "context spans . to 12, wanted 0 to 11"),
        (lambda c, x, t: (c, x, change(t, -1)), "target spans -1 to ., wanted 0 to 9"),
    ],
)
def test_tokens_it_does_not_speak_are_refused(broken, message):
    stage = build("coarse")
    for takes in (stage, lambda *tokens: stage.prefill(*tokens, lambda *_: None)):
        with pytest.raises(ValueError, match=message):
            takes(*broken(*inputs(stage)))


def test_context_given_to_a_stage_without_is_refused():
    stage = build("semantic")
    conditioning, _, target = inputs(stage)
    with pytest.raises(ValueError, match="context is given, this stage has 0 levels"):
        stage(conditioning, target, target)


def test_a_sequence_past_the_bias_table_is_refused():
    stage = build("coarse", max_frames=6)
    with pytest.raises(ValueError, match="8 frames is longer than max_frames 6"):
        stage(*inputs(stage))


def test_decoding_past_the_bias_table_is_refused():
    stage = build("semantic", max_frames=6)
    conditioning, _, target = inputs(stage)
    with pytest.raises(ValueError, match="8 frames is longer than max_frames 6"):
        decode_stage(
            stage,
            conditioning=conditioning,
            context=None,
            prefix=target[:, :2],
            frames=8,
            seeds=torch.zeros(3, dtype=torch.int64),
            sampling=Sampling(),
        )
