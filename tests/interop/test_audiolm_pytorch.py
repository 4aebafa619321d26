"""audiolm-pytorch's stages through our decode step: golden/make_audiolm_pytorch.py says which."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.case import CannotRun
from benchmarks.peers import audiolm_pytorch
from musiclm_engine.generation import DecodeStep, Sampling
from musiclm_engine.generation.cache import KVCache
from musiclm_engine.generation.decoder import step_layers
from musiclm_engine.interop import stage_from_audiolm_pytorch

FILE = Path(__file__).parent / "golden" / "make_audiolm_pytorch.py"
UPSTREAM = json.loads(FILE.with_name("audiolm_pytorch.json").read_text())
FRAMES = 4  # of the fine stage: its coarse tokens


def load_maker():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_maker()


def state_of(case):
    return maker.weights(UPSTREAM[case]["shapes"])


def stage_of(state, kind, **options):
    options = {"length": FRAMES if kind == "fine" else 40, "dtype": torch.float32, **options}
    return stage_from_audiolm_pytorch(state, **options)


def tokens_of(kind):
    """Context, or None, and target."""
    given = maker.inputs()
    context = {"semantic": None, "coarse": "semantic", "fine": "coarse"}[kind]
    return None if context is None else given[context], given[kind]


def memory_of(stage, condition):
    text = maker.inputs()["text"]
    if condition == "without":
        return None
    hidden = torch.zeros(text.shape[:2], dtype=torch.bool)
    return stage.memory(text, hidden if condition == "null" else None)


@torch.no_grad()
def logits_of(stage, kind, condition):
    """[B, N, V] of every target token and the one that would follow, token by token."""
    context, target = tokens_of(kind)
    x = stage.prompt(context, target)
    (B, N, _), decoder = x.shape, stage.decoder
    context_length = 0 if context is None else context.shape[1]
    codes = stage.codes(context_length, N)
    cache = KVCache.empty(
        layers=len(decoder.layers), batch=B, heads=1, slots=N, dim_head=decoder.dim_head,
        device=x.device, dtype=torch.float32,
    )  # fmt: skip
    memory, outputs = memory_of(stage, condition), []
    for place in range(N):
        positions = torch.full((B,), place, dtype=torch.int32)
        hidden = x[:, place].clone()
        if decoder.streams > 1:
            hidden = hidden[:, None].repeat(1, decoder.streams, 1)
        step_layers(
            decoder, hidden, replace(cache, positions=positions, lengths=positions + 1),
            memory=memory, dtype=torch.float32,
            q_code=None if codes is None else codes[0][place].expand(B).contiguous(),
            k_codes=None if codes is None else codes[1][None],
        )  # fmt: skip
        hidden = hidden if decoder.streams == 1 else hidden.sum(1)
        outputs.append(F.layer_norm(hidden, hidden.shape[-1:], *decoder.norm))
    hidden = torch.stack(outputs, 1)[:, N - target.shape[1] - 1 :]
    level = torch.arange(hidden.shape[1]) % len(decoder.head)
    out = torch.einsum("bnd,nvd->bnv", hidden, decoder.head[level])
    return out if decoder.head_bias is None else out + decoder.head_bias[level]


def assert_close(found, wanted):
    """fp32 against fp32, after three layers."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("case", UPSTREAM)
def test_steps_give_upstreams_logits(case):
    kind, condition, mode = case.split(", ")
    stage = stage_of(state_of(case), kind, hyper_connections=mode)
    found = logits_of(stage, kind, condition)
    assert_close(found, torch.tensor(UPSTREAM[case]["logits"]).view(found.shape))


def test_the_golden_file_tells_the_cases_apart():
    for kind in maker.KINDS:
        rows = [torch.tensor(UPSTREAM[c]["logits"]) for c in UPSTREAM if c.startswith(kind)]
        assert len(rows) == 6
        for number, row in enumerate(rows):
            for other in rows[:number]:
                assert float((row - other).abs().max()) > 0.02


@pytest.fixture(scope="module")
def package():
    try:
        return audiolm_pytorch()
    except CannotRun as reason:
        pytest.skip(str(reason))


def mode_of(package):
    """What the hyper-connections package that is installed computes."""
    case = "semantic, without, unmixed"
    found = maker.logits(maker.build(package, "semantic", "without"), "semantic", "without")
    wanted = torch.tensor(UPSTREAM[case]["logits"]).view(found.shape)
    return "unmixed" if torch.allclose(found, wanted, atol=1e-3) else "mixed"


@pytest.mark.parametrize("kind", maker.KINDS)
@pytest.mark.parametrize("condition", ["without", "text"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_residual_streams": 1}, {"add_value_residual": False}, {"rel_pos_bias": False}],
    ids=str,
)
def test_steps_give_the_installed_packages_logits(package, kind, condition, options):
    model = maker.build(package, kind, condition, **options)
    averaged = options.get("add_value_residual", True)
    stage = stage_of(model, kind, hyper_connections=mode_of(package), value_residual=averaged)
    assert stage.decoder.streams == options.get("num_residual_streams", 4)
    assert_close(logits_of(stage, kind, condition), maker.logits(model, kind, condition))


def test_names_before_2_4_0():
    """Without streams, and without `branch.` in the names."""
    new = {
        name: value
        for name, value in state_of("coarse, text, unmixed").items()
        if ".branch." in name or not name.startswith("transformer.layers.")
    }
    old = {name.replace(".branch.", "."): value for name, value in new.items()}
    found = [logits_of(stage_of(state, "coarse"), "coarse", "text") for state in (new, old)]
    assert torch.equal(*found)


def test_a_trainers_checkpoint():
    state = state_of("semantic, without, unmixed")
    checkpoint = {"model": state, "optim": {}, "version": "2.4.0"}
    found = [logits_of(stage_of(s, "semantic"), "semantic", "without") for s in (state, checkpoint)]
    assert torch.equal(*found)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_decode_step_draws_what_the_logits_say(guidance):
    """Greedy, from a prompt, through the static cache."""
    stage = stage_of(state_of("coarse, text, unmixed"), "coarse")
    semantic, coarse = tokens_of("coarse")
    text = maker.inputs()["text"]
    mask = (text != 0).any(-1)
    if guidance != 1:
        text, mask = torch.cat([text, text]), torch.cat([mask, torch.zeros_like(mask)])
    step = DecodeStep(
        stage.decoder, rows=2, length=semantic.shape[1] + 2 + 14, memory=stage.memory(text, mask),
        sampling=Sampling(temperature=0.0, guidance=guidance),
    )  # fmt: skip
    stage.begin(step, semantic, coarse[:, :3], seeds=torch.arange(2))
    for _ in range(11):
        step()
    drawn = step.tokens[:, 3:]
    sequence = torch.cat([coarse[:, :3], drawn], 1)
    found = {}
    for condition in ("text", "null"):
        given = {**maker.inputs(), "coarse": sequence}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maker, "inputs", lambda given=given: given)
            found[condition] = logits_of(stage, "coarse", condition)[:, 3:-1]
    mixed = found["null"] + guidance * (found["text"] - found["null"])
    assert torch.equal(drawn, mixed.argmax(-1))
    assert len(drawn.unique()) > 3


@pytest.mark.parametrize("kind", maker.KINDS)
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"dtype": torch.bfloat16}, 0.05),
        ({"dtype": torch.float32, "weight_dtype": torch.int8}, 0.05),
    ],
    ids=["bfloat16", "int8"],
)
def test_narrow_weights_err_as_much_as_they_may(kind, options, bound):
    state = state_of(f"{kind}, without, unmixed")
    wanted = logits_of(stage_of(state, kind), kind, "without")
    narrow = stage_of(state, kind, **options)
    # The head is tested where it is drawn from.
    narrow = replace(
        narrow,
        decoder=replace(narrow.decoder, head=stage_of(state, kind).decoder.head, head_scale=None),
    )
    error = (logits_of(narrow, kind, "without") - wanted).square().mean().sqrt()
    assert 0 < float(error) < bound * float(wanted.std())


def test_rows_of_weights_begin_at_multiples_of_32_columns():
    layer = stage_of(state_of("semantic, without, unmixed"), "semantic").decoder.layers[0]
    assert layer.feed_forward.down.values.shape == (32, 85)
    assert layer.feed_forward.down.values.stride() == (96, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer.norm.gamma"), "state has no transformer.norm.gamma"),
        (lambda s: s.update(stray=torch.zeros(1)), "1 unknown entries: stray"),
        (lambda s: s.pop("start_token"), "no start token"),
        (lambda s: [s.pop(n) for n in list(s) if "layers" in n], "no transformer.layers"),
        (
            lambda s: [s.pop(n) for n in list(s) if n.startswith("transformer.layers.1.1.")],
            "2 of 3 layers have cross-attention",
        ),
    ],
)
def test_states_that_are_none_are_refused(change, message):
    state = state_of("semantic, text, unmixed")
    change(state)
    with pytest.raises(ValueError, match=message):
        stage_of(state, "semantic")


def test_arguments_that_are_wrong_are_refused():
    state = state_of("coarse, without, unmixed")
    with pytest.raises(ValueError, match="hyper_connections='both'"):
        stage_of(state, "coarse", hyper_connections="both")
    with pytest.raises(ValueError, match="length=0"):
        stage_of(state, "coarse", length=0)
    stage = stage_of(state, "coarse")
    semantic, coarse = tokens_of("coarse")
    with pytest.raises(ValueError, match="context is missing"):
        stage.prompt(None, coarse)
    with pytest.raises(ValueError, match="context spans 0 to 99"):
        stage.prompt(semantic.clone().index_fill_(1, torch.tensor([1]), 99), coarse)
    with pytest.raises(ValueError, match="without conditioning"):
        stage.memory(maker.inputs()["text"])


@pytest.mark.parametrize("kind", ["semantic", "coarse"])
def test_a_length_past_the_bias_table_is_refused(kind):
    stage = stage_of(state_of(f"{kind}, without, unmixed"), kind)
    assert len(stage.codes(7, 40)[0]) == 40
    with pytest.raises(ValueError, match="length is 41, wanted at most 40"):
        stage.codes(7, 41)


def test_other_frames_than_a_fine_stages_are_refused():
    stage = stage_of(state_of("fine, without, unmixed"), "fine")
    assert len(stage.codes(8, 22)[0]) == 22
    for frames in (3, 5):
        with pytest.raises(ValueError, match=f"context_length is {2 * frames}, wanted 8"):
            stage.codes(2 * frames, 20)
    with pytest.raises(ValueError, match="length is 23, wanted at most 22"):
        stage.codes(8, 23)


def test_prompts_that_a_step_does_not_hold_are_refused():
    stage = stage_of(state_of("coarse, without, unmixed"), "coarse")
    context, target = (tokens[:1] for tokens in tokens_of("coarse"))

    def begin(context_rows=4, target_rows=4, **options):
        step = DecodeStep(
            stage.decoder, rows=4, sampling=Sampling(guidance=3.0), **{"length": 17, **options}
        )
        seeds = torch.arange(4)
        stage.begin(
            step, context.repeat(context_rows, 1), target.repeat(target_rows, 1), seeds=seeds
        )

    begin()  # 2 + 7 + 8 tokens
    begin(length=18, slots=17)
    for rows in (1, 2, 3, 8):
        with pytest.raises(ValueError, match=f"target is of {rows} rows, wanted 4"):
            begin(target_rows=rows)
        with pytest.raises(ValueError, match=f"context is of {rows} rows, wanted 4"):
            begin(context_rows=rows)
    with pytest.raises(ValueError, match="target makes a prompt of 17 tokens, wanted at most 16"):
        begin(length=16)
    with pytest.raises(ValueError, match="target makes a prompt .* its cache has 16 slots"):
        begin(length=40, slots=16)
    with pytest.raises(ValueError, match="length is 41, wanted at most 40"):
        begin(length=41)
