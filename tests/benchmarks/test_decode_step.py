"""The benchmark of a decode step: its gate, at a size that takes no time."""

import pytest
import torch

from benchmarks import decode_peers, decode_providers, decode_setup, decode_step
from benchmarks.case import CannotRun
from benchmarks.decode_models import audiolm_state
from benchmarks.peers import audiolm_pytorch
from benchmarks.record import TIMED, WRONG
from musiclm_engine.generation.cache import CachedLayer

SMALL = {"dim": 64, "depth": 2, "heads": 2, "batch": 2, "context": 20, "dtype": "bfloat16"}
DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(decode_step, "STEPS_AT_ONCE", 1)


def run(only, **fields):
    case = decode_setup.DecodeStepCase(**{**SMALL, **fields})
    rows = decode_step.run_case(case, DEVICE, 0.0, {only})
    assert [row["provider"] for row in rows] == [only]
    return rows[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["paper", "audiolm"])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_an_eager_step_is_right_and_timed(model, guidance, dtype):
    row = run("ours eager", model=model, guidance=guidance, dtype=dtype)
    assert row["status"] == TIMED, row.get("reason")
    assert set(row["errors"]) == {"keys", "values", "logits"}
    assert row["same_top_1"] == 1 and row["kl_nats"] < 0.05
    assert row["tokens_per_s"] > 0


def test_a_wrong_step_is_not_timed(monkeypatch):
    right = decode_setup.newest

    def wrong(layers, slot):
        results = right(layers, slot)
        results["keys"][0, 0, 3] += 1.0
        return results

    monkeypatch.setattr(decode_providers, "newest", wrong)  # the definition's are as they were
    row = run("ours eager", model="paper")
    assert row["status"] == WRONG and "keys" in row["reason"]
    assert "median_us" not in row


def test_upstream_takes_the_random_weights_and_gives_the_definitions_logits():
    try:
        package = audiolm_pytorch()
    except CannotRun as reason:
        pytest.skip(str(reason))
    model = package.SemanticTransformer(
        dim=64, depth=2, heads=2, num_semantic_tokens=1024, audio_text_condition=True
    )
    model.load_state_dict(audiolm_state(64, 2, 2))
    row = run("audiolm-pytorch", model="audiolm", guidance=3.0)
    assert row["status"] == TIMED, row.get("reason")


def test_the_compiled_static_cache_is_right_in_what_is_timed():
    row = run("compiled static cache", model="paper", guidance=3.0)
    assert row["status"] == TIMED, row.get("reason")
    assert set(row["errors"]) == {"keys", "values", "logits"}


def test_the_compiled_static_cache_goes_from_token_to_token():
    """Each call draws a token and writes the next slot as the uncompiled model does."""
    case = decode_setup.DecodeStepCase(**{**SMALL, "dtype": "float32"}, model="paper")
    setup = decode_setup.Setup(case, DEVICE)
    models = [
        decode_peers.StaticCacheModel(
            setup.decoder(torch.float32)[0], case.rows, setup.slots, torch.float32
        ).eval()
        for _ in range(2)
    ]
    for model in models:
        setup.fill(tuple(CachedLayer(*cache, None, None) for cache in model.caches()))
    step = decode_providers._step_of(setup, models[0])
    run_compiled, drawn = decode_peers.compiled(step), []
    for number in range(4):
        assert int(step.position) == case.context + number
        with torch.no_grad():
            logits = models[1](step.tokens, step.position)
        least = logits.topk(decode_providers.TOP_K).values[:, -1]
        run_compiled()
        assert bool((logits.gather(1, step.tokens[:, None])[:, 0] >= least).all())
        drawn.append(step.tokens.tolist())
    assert len({tuple(tokens) for tokens in drawn}) > 1
    for found, wanted in zip(models[0].caches(), models[1].caches(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_llama_is_compiled_and_timed():
    pytest.importorskip("transformers")
    row = run("transformers static cache", model="paper")
    assert row["status"] == TIMED, row.get("reason")


def test_every_case_has_a_name_of_its_own():
    for device in ("cpu", "cuda"):
        names = [case.name for case in decode_step.cases(device)]
        assert len(set(names)) == len(names) > 3
