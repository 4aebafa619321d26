"""A whole set in one command: cut anywhere, bounded in time, carried to another machine."""

import math
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_engine.audiolm import stage
from musiclm_engine.audiolm.best_rq import BestRQTokenizer
from musiclm_engine.checkpoint import CheckpointError, read_tensors
from musiclm_engine.components import load_component
from musiclm_engine.training import loop, parcel, stage_recipe
from musiclm_engine.training.bundle import bundle_run
from musiclm_engine.training.config import ConfigError, load_config, models_of
from musiclm_engine.training.learner import Learner, descend
from musiclm_engine.training.parcel import pack, unpack
from musiclm_engine.training.run import RECIPES, Limits, train
from musiclm_engine.training.schedule import Schedule
from musiclm_engine.training.workplace import Workplace

CPU = torch.device("cpu")
MODELS = models_of({"semantic": {"counts_beats": True}})  # as `tiny_config`
NOW = Limits(stop_at=0.0)  # long past: a call takes one step and stops


def train_all(config, manifest, run_dir, name="all", **arguments):
    told = []
    done = train(
        name,
        config=str(config),
        manifest=manifest,
        run_dir=run_dir,
        device=CPU,
        report=lambda *what: told.append(what),
        **arguments,
    )
    return done, told


def models(run_dir):
    return {
        path.relative_to(run_dir): path.read_bytes() for path in sorted(run_dir.glob("*/model.*"))
    }


@pytest.fixture(scope="module")
def whole(tiny_config, tiny_corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    done, told = train_all(tiny_config, tiny_corpus, run_dir)
    assert done
    return run_dir, told


def test_all_are_trained_in_their_order(whole, tiny_config):
    run_dir, told = whole
    order = list(dict.fromkeys(what for what, *_ in told))
    assert [name for name in order if name in MODELS] == list(MODELS)
    assert "tokens" in order
    made = bundle_run(run_dir, config=str(tiny_config)).generate("a hymn", seconds=0.4)
    assert torch.isfinite(made.audio).all()


def test_cut_at_every_step_it_is_the_same(whole, tiny_config, tiny_corpus, tmp_path):
    calls, done = 0, False
    while not done:
        done, _ = train_all(tiny_config, tiny_corpus, tmp_path, limits=NOW)
        calls += 1
    assert calls == 8  # every step but the last of each of six models
    assert models(tmp_path) == models(whole[0])


def test_cut_short_within_its_last_save_it_gets_its_model_still(
    whole, tiny_config, tiny_corpus, tmp_path, monkeypatch
):
    def cut(*arguments, **others):
        raise InterruptedError

    for half in ("save_model", "write_tensors"):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(loop, half, cut)
            train_all(tiny_config, tiny_corpus, tmp_path / half, "codec")
        assert train_all(tiny_config, tiny_corpus, tmp_path / half, "codec")[0]
        made = models(tmp_path / half)
        assert made == {path: it for path, it in models(whole[0]).items() if path in made}
        assert len(made) == 2


def test_a_whole_set_is_left_as_it_is(whole, tiny_config, tiny_corpus):
    before = models(whole[0])
    assert train_all(tiny_config, tiny_corpus, whole[0]) == (True, [])
    gone = tiny_corpus.with_name("gone.jsonl")  # nor is anything needed to leave it
    assert train_all(tiny_config, gone, whole[0]) == (True, [])
    assert models(whole[0]) == before


def test_tokens_cut_short_go_on_and_are_the_same(
    whole, tiny_config, tiny_corpus, tmp_path, monkeypatch
):
    shutil.copytree(whole[0], tmp_path / "run")
    place = Workplace(tmp_path / "run", tiny_corpus, load_config(str(tiny_config)), CPU)
    path = tmp_path / "run" / "tokens" / "train.safetensors"
    before = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(stage_recipe, "CLIPS_A_PART", 3)  # of four clips
    make, made = stage_recipe.tokenize_clips, []

    def make_one_a_call(audio, captions, **others):
        if len(made) == calls:
            raise InterruptedError
        made.append(len(captions))
        return make(audio, captions, **others)

    monkeypatch.setattr(stage_recipe, "tokenize_clips", make_one_a_call)
    calls = 1
    with pytest.raises(InterruptedError):
        stage_recipe.tokens(place, "train")
    calls = 2
    stage_recipe.tokens(place, "train")
    assert made == [3, 1] and path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {
        "train.safetensors",
        "validation.safetensors",
    }


# Time.


@pytest.fixture
def endless(tiny_config, tmp_path):
    """The same set, which steps alone would not end."""
    text = tiny_config.read_text()
    for steps in ("steps = 3", "steps = 2"):
        text = text.replace(steps, "steps = 1_000_000_000\nshare = 0.16")
    path = tmp_path / "endless.toml"
    path.write_text(text)
    return path


def test_minutes_end_what_steps_do_not(endless, tiny_corpus, tmp_path):
    minutes = 0.1  # 1 s a model
    limits = Limits(minutes=minutes)
    done, told = train_all(endless, tiny_corpus, tmp_path / "run", "codec", limits=limits)
    counts = read_tensors(tmp_path / "run" / "codec" / "checkpoint.safetensors")
    assert done and 60 * minutes * 0.16 <= counts["seconds"] < 60 * minutes * 0.8
    steps = [steps for what, steps, _, figures in told if what == "codec"]
    assert steps == list(range(1, int(counts["steps"]) + 1))
    assert told[-1][1] == told[-1][2] and told[-1][3]["train/progress"] == 1
    assert train_all(endless, tiny_corpus, tmp_path / "run", "codec", limits=limits) == (True, [])


def test_seconds_before_an_interruption_count(endless, tiny_corpus, tmp_path):
    limits = Limits(minutes=100.0, stop_at=0.0)
    seconds = []
    for _ in range(3):
        assert not train_all(endless, tiny_corpus, tmp_path / "run", limits=limits)[0]
        counts = read_tensors(tmp_path / "run" / "codec" / "checkpoint.safetensors")
        seconds.append(float(counts["seconds"]))
    assert 0 < seconds[0] < seconds[1] < seconds[2] and counts["steps"] == 3


def test_minutes_want_shares(tiny_config, tiny_corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"\[codec\] of the configuration has no share"):
        train_all(tiny_config, tiny_corpus, tmp_path, limits=Limits(minutes=1.0))
    none = tmp_path / "none.toml"
    none.write_text(tiny_config.read_text().replace("[codec]", "[codec]\nshare = 0"))
    with pytest.raises(ConfigError, match=r"\[codec\] has share = 0"):
        train_all(none, tiny_corpus, tmp_path, limits=Limits(minutes=1.0))


def test_shares_are_of_one_whole(endless, tiny_corpus, tmp_path):
    endless.write_text(endless.read_text().replace("share = 0.16", "share = 0.17"))
    with pytest.raises(ConfigError, match="endless.toml add up to 1.02, wanted at most 1"):
        train_all(endless, tiny_corpus, tmp_path / "run", limits=Limits(minutes=1.0))
    assert train_all(endless, tiny_corpus, tmp_path / "run", limits=NOW)[0] is False


def test_the_rate_follows_steps_or_minutes_whichever_are_further():
    schedule = Schedule(steps=1000, learning_rate=2.0, warmup=10, minutes=1.0)
    assert schedule.rate(4, 0.0) == pytest.approx(1.0)
    assert schedule.rate(100, 45.0) == 2.0
    assert schedule.rate(100, 52.5) == pytest.approx(1.0)
    assert schedule.rate(875, 1.0) == pytest.approx(1.0)
    assert schedule.progress(500, 6.0) == 0.5 and schedule.progress(10, 60.0) == 1.0
    for minutes in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="minutes is"):
            Schedule(steps=1, minutes=minutes)


def test_losses_are_compiled_where_the_configuration_says_so(
    tiny_config, tiny_corpus, tmp_path, monkeypatch
):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    train_all(tiny_config, tiny_corpus, tmp_path / "plain", "codec")
    assert not compiled
    path = tmp_path / "compiled.toml"
    path.write_text(tiny_config.read_text().replace("[codec]", "[codec]\ncompile = true"))
    train_all(path, tiny_corpus, tmp_path / "compiled", "codec")
    assert compiled and models(tmp_path / "compiled") == models(tmp_path / "plain")


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values that it looks at."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["codec", "mulan", "semantic", "coarse", "fine"])
def test_a_step_reads_nothing_back(whole, tiny_config, tiny_corpus, monkeypatch, name):
    monkeypatch.setattr(stage, "_check_values", lambda *tokens: None)  # as on a GPU
    recipe = RECIPES[name](Workplace(whole[0], tiny_corpus, load_config(str(tiny_config)), CPU))
    recipe.model.train()
    learner = Learner(recipe.model, Schedule(steps=3))
    for step in range(2):
        with Reads() as reads:
            descend([learner], recipe.losses(step), rate=1e-4, clip=1.0)
        if step > 0:  # the first one starts codebooks from the data
            assert reads.count == 0
    with Reads() as reads:
        bool(torch.ones(1))
    assert reads.count == 1


# A parcel.


def test_a_parcel_of_a_whole_set_makes_the_same_bundle(whole, tmp_path):
    parts = pack(whole[0], tmp_path / "parcel", part_bytes=4000)
    assert len(parts) > 3 and all(part.stat().st_size <= 4000 for part in parts)
    unpack(tmp_path / "parcel", tmp_path / "run")
    assert models(tmp_path / "run") == models(whole[0])


def test_training_goes_on_from_a_parcel(tiny_config, tiny_corpus, tmp_path):
    far = tmp_path / "far"
    while not (far / "coarse" / "model.json").exists():
        train_all(tiny_config, tiny_corpus, far, limits=NOW, parcel=tmp_path / "parcel")
    unpack(tmp_path / "parcel", tmp_path / "near")
    before = models(tmp_path / "near")
    assert before == {path: it for path, it in models(far).items() if path.parts[0] != "coarse"}
    held, there = (
        load_file(folder / "coarse" / "checkpoint.safetensors")
        for folder in (tmp_path / "near", far)
    )
    assert held.keys() == there.keys() and held["steps"] == there["steps"] == 1
    for name, value in there.items():
        torch.testing.assert_close(held[name].to(value.dtype), value, rtol=2**-8, atol=1e-6)
    moments = {n: v for n, v in held.items() if n.startswith("optimizer/") and v.dim()}
    assert moments and all(value.dtype == torch.bfloat16 for value in moments.values())

    done, told = train_all(tiny_config, tiny_corpus, tmp_path / "near")
    assert done and [what for what, *_ in told if what in MODELS] == ["coarse", "fine", "fine"]
    after = models(tmp_path / "near")
    assert len(after) == 2 * len(MODELS)
    assert all(after[path] == before[path] for path in before)


def test_a_parcel_that_is_not_whole_is_refused(whole, tmp_path):
    parcel = tmp_path / "parcel"
    with pytest.raises(CheckpointError, match="holds no parcel: run.zip.000 is missing"):
        unpack(parcel, tmp_path / "run")
    parts = pack(whole[0], parcel, part_bytes=4000)
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[:-100] + bytes(100))
    with pytest.raises(CheckpointError, match="is broken, or one of its"):
        unpack(parcel, tmp_path / "run")
    parts[1].write_bytes(content)
    parts[-1].unlink()
    with pytest.raises(CheckpointError, match="is broken, or one of its"):
        unpack(parcel, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_byte_that_is_wrong_is_told_plainly(whole, tmp_path):
    (part,) = pack(whole[0], tmp_path / "parcel")
    content = part.read_bytes()
    for place in range(100, len(content) - 100, len(content) // 40):
        part.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="is broken|holds .*not a run"):
            unpack(tmp_path / "parcel", tmp_path / "run")


def test_a_parcel_cut_short_leaves_the_older_one(whole, tmp_path, monkeypatch):
    pack(whole[0], tmp_path / "parcel", part_bytes=4000)
    write, opened = parcel.whole_file, []

    def cut(path):
        opened.append(path)
        if len(opened) == 3:
            raise InterruptedError
        return write(path)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(parcel, "whole_file", cut)
        pack(whole[0], tmp_path / "parcel", part_bytes=5000)
    unpack(tmp_path / "parcel", tmp_path / "run")
    assert models(tmp_path / "run") == models(whole[0])


def test_what_came_as_done_cannot_be_trained_longer(whole, tiny_config, tiny_corpus, tmp_path):
    pack(whole[0], tmp_path / "parcel")
    unpack(tmp_path / "parcel", tmp_path / "run")
    longer = tmp_path / "longer.toml"
    longer.write_text(tiny_config.read_text().replace("steps = 3", "steps = 4"))
    with pytest.raises(CheckpointError, match="came in a parcel: give the same steps and minutes"):
        train_all(longer, tiny_corpus, tmp_path / "run", "codec")


def test_a_parcel_does_not_go_over_a_run(whole, tmp_path):
    pack(whole[0], tmp_path / "parcel")
    with pytest.raises(ValueError, match="holds a run already"):
        unpack(tmp_path / "parcel", whole[0])


def test_a_smaller_parcel_leaves_no_part_of_a_larger_one(whole, tmp_path):
    many = pack(whole[0], tmp_path, part_bytes=4000)
    few = pack(whole[0], tmp_path, part_bytes=40000)
    assert len(few) < len(many) and sorted(tmp_path.iterdir()) == few


def test_stopping_in_time_leaves_a_parcel(tiny_config, tiny_corpus, tmp_path):
    stop = Limits(stop_at=time.monotonic())
    done, _ = train_all(
        tiny_config, tiny_corpus, tmp_path / "run", limits=stop, parcel=tmp_path / "out"
    )
    assert not done and [path.name for path in (tmp_path / "out").iterdir()] == ["run.zip.000"]


# A network beneath the semantic tokens.


def test_a_semantic_encoder_is_trained_where_there_is_one(tiny_config, tiny_corpus, tmp_path):
    path = tmp_path / "encoder.toml"
    path.write_text(
        tiny_config.read_text() + "[semantic_encoder]\nkind = 'best-rq'\nsteps = 2\n"
        "batch_size = 2\ncrop_seconds = 1.0\nmodel = { num_tokens = 8, num_components = 8, "
        "dim = 16, depth = 2, heads = 1, feature_layer = 1 }\n"
    )
    for name in ("semantic_encoder", "tokenizer"):
        assert train_all(path, tiny_corpus, tmp_path / "run", name)[0]
    encoder, tokenizer = (
        load_component("tokenizer", tmp_path / "run" / name / "model")
        for name in ("semantic_encoder", "tokenizer")
    )
    assert type(tokenizer) is type(encoder) is BestRQTokenizer
    assert tokenizer.centroids.any() and not encoder.centroids.any()
    pack(tmp_path / "run", tmp_path / "parcel")
    unpack(tmp_path / "parcel", tmp_path / "near")  # which holds it once, in the tokenizer
    assert not (tmp_path / "near" / "semantic_encoder" / "model.json").exists()
    assert train_all(path, tiny_corpus, tmp_path / "near", "semantic_encoder") == (True, [])
    weights = dict(encoder.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in tokenizer.named_parameters())
    with pytest.raises(ConfigError, match=r"has no \[semantic_encoder\]"):
        train_all(tiny_config, tiny_corpus, tmp_path / "run", "semantic_encoder")
