"""Configurations, batches that are functions of their number, and a whole set trained."""

import os
import shutil
import tomllib
from dataclasses import replace

import pytest
import torch

from musiclm_engine import SoundStream
from musiclm_engine.audio import load_audio
from musiclm_engine.checkpoint import CheckpointError, read_tensors, write_tensors
from musiclm_engine.data.manifest import ManifestError, load_manifest
from musiclm_engine.generation import Sampling, Windows
from musiclm_engine.training.bundle import bundle_run
from musiclm_engine.training.clip_bank import open_bank
from musiclm_engine.training.clips import Crops
from musiclm_engine.training.config import TRAINED, ConfigError, load_config, models_of, table
from musiclm_engine.training.loop import Schedule
from musiclm_engine.training.run import RECIPES
from musiclm_engine.training.token_cache import TokenCache
from tests.engine.training_runs import train_one

MODELS = models_of({"semantic": {"counts_beats": True}})  # as `tiny_config`


@pytest.fixture(scope="module")
def trained(tiny_config, tiny_corpus, tmp_path_factory):
    """All models, in their order, and what was told of each."""
    run_dir = tmp_path_factory.mktemp("run")
    told = {name: train_one(name, tiny_config, tiny_corpus, run_dir) for name in MODELS}
    return run_dir, told


# Configurations.


@pytest.mark.parametrize("name", ["tiny", "tiny-h100", "recordings"])
def test_a_bundled_configuration_is_whole(name):
    config = load_config(name)
    for model in TRAINED:
        table(config, model)
    for model in RECIPES:
        settings = table(config, model)
        fields = Schedule.__dataclass_fields__
        Schedule(**{key: value for key, value in settings.items() if key in fields})
    shares = [config[model]["share"] for model in RECIPES]
    assert all(shares) and sum(shares) < 0.95  # the rest is for tokens and clusters


def test_both_bundled_configurations_are_of_the_same_models():
    one, other = load_config("tiny"), load_config("tiny-h100")
    for model in TRAINED:
        for entry in ("model", "audio", "text", "sampling", "crop_seconds"):
            assert one[model].get(entry) == other[model].get(entry)


def test_a_configuration_extends_another(tmp_path):
    path = tmp_path / "more.toml"
    path.write_text("extends = 'tiny'\nseed = 7\n[fine]\nsteps = 5\nmodel = { dim = 16 }\n")
    base, config = load_config("tiny"), load_config(str(path))
    assert config["seed"] == 7 and config["codec"] == base["codec"]
    assert config["fine"] == base["fine"] | {"steps": 5, "model": {"dim": 16}}
    (tmp_path / "most.toml").write_text("extends = 'own.toml'\n[codec]\nsteps = 2\n")
    (tmp_path / "own.toml").write_text("[codec]\nsteps = 1\nbatch_size = 3\n")
    assert load_config(str(tmp_path / "most.toml")) == {"codec": {"steps": 2, "batch_size": 3}}
    path.write_text("extends = 'recordings'\n[mulan]\nsteps = 9\n")  # which extends tiny itself
    config = load_config(str(path))
    assert config["mulan"] == base["mulan"] | {"facts": [], "steps": 9}
    assert config["fine"] == base["fine"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends = 'huge'", "no configuration huge"),
        ("extends = 3", "has extends = 3, wanted the name"),
        ("extends = 'odd.toml'", "odd.toml extends itself"),
        ("[codec]\nshare = 1.5", r"\[codec\] of .* has share = 1.5, wanted a number from 0 to 1"),
        ("[codec]\nshare = 'all'", r"has share = 'all'"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(tmp_path, text, message):
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[codec", "is not TOML"),
        ("[codek]\nsteps = 3", "has unknown entries: codek; wanted seed, extends, codec"),
        ("[codec]\nlearning_rte = 1", r"\[codec\] of .* has unknown entries: learning_rte; wanted"),
        ("codec = 3", r"has codec = 3, wanted a table \[codec\]"),
        ("seed = 'x'", "has seed = 'x', wanted a whole number"),
        ("[semantic]\ncounts_beats = 'no'", r"counts_beats = 'no', wanted true or false"),
        ("seed = -1", "has seed = -1, wanted a whole number"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(tmp_path, text, message):
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_an_unknown_name_tells_the_known_ones():
    with pytest.raises(
        ConfigError, match="no configuration huge: give a .toml file or one of .*tiny"
    ):
        load_config("huge")
    with pytest.raises(ConfigError, match="no configuration nowhere.toml"):
        load_config("nowhere.toml")


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("codec", "[codec]", "[tokenizer2]", "unknown entries: tokenizer2"),
        ("codec", "steps = 3\n", "", r"\[codec\] of .* does not fit .*steps"),
        ("codec", "steps = 3", "steps = -3", "steps is -3"),
        ("codec", "batch_size = 2\ncrop_seconds = 0.32", "batch_size = 2", "has no crop_seconds"),
        ("codec", "encoder_depth", "encoder_deep", r"\[codec\] of .* does not fit .*encoder_deep"),
        ("codec", "[codec]", "[codec]\ndomain = 'cepstrum'", "domain = 'cepstrum', wanted one of"),
        ("codec", "[codec]", "[codec]\nprecision = 'fp8'", "precision is 'fp8'"),
    ],
)
def test_what_a_model_needs_is_named(tmp_path, tiny_config, tiny_corpus, name, old, new, message):
    text = tiny_config.read_text()
    assert old in text
    path = tmp_path / "odd.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        train_one(name, path, tiny_corpus, tmp_path / "run")
    assert not (tmp_path / "run" / name / "model.json").exists()


def test_a_table_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"has no \[fine\]"):
        table({"codec": {}}, "fine")


def test_an_unknown_model_is_refused(tiny_config, tiny_corpus, tmp_path):
    with pytest.raises(ValueError, match="name is 'vocals', wanted one of codec, .*, fine, all"):
        train_one("vocals", tiny_config, tiny_corpus, tmp_path)


# Crops.


@pytest.fixture(scope="module")
def bank(tiny_corpus, tmp_path_factory):
    clips = load_manifest(tiny_corpus, "train")
    return open_bank(clips, tmp_path_factory.mktemp("bank") / "train.pcm", 16000)


@pytest.fixture
def crops(bank, tiny_corpus):
    def make(seed=0, seconds=0.5):
        return Crops(bank, load_manifest(tiny_corpus, "train"), seconds, 6, seed)

    return make


def test_a_batch_of_crops_is_a_function_of_seed_and_step(crops, tiny_corpus):
    audio, captions = crops().batch(3)
    again, same = crops().batch(3)
    assert audio.shape == (6, 8000) and torch.equal(audio, again) and captions == same
    assert not torch.equal(audio, crops().batch(4)[0])
    assert not torch.equal(audio, crops(seed=1).batch(3)[0])
    own = [set(clip.captions) for clip in load_manifest(tiny_corpus, "train")]
    assert all(any(caption in some for some in own) for caption in captions)


def test_a_crop_is_its_stretch_of_its_clip(crops, tiny_corpus):
    draw, (audio, captions) = crops().draw(2), crops().batch(2)
    clips = load_manifest(tiny_corpus, "train")
    assert captions == draw.captions and len(set(draw.starts)) > 1
    for row, start, crop, caption in zip(draw.rows, draw.starts, audio, captions, strict=True):
        assert torch.equal(crop, load_audio(clips[row].audio, 16000)[start : start + 8000])
        assert caption in clips[row].captions


def test_crops_reach_the_first_and_the_last_sample(crops):
    starts = {int(start) for step in range(40) for start in crops(seconds=1.1999).draw(step).starts}
    assert starts == {0, 1, 2}


def test_a_clip_shorter_than_the_crop_ends_in_silence(crops):
    audio, _ = crops(seconds=2.0).batch(0)
    assert audio.shape == (6, 32000)
    assert (audio[:, :19200].abs().amax(1) > 0.1).all() and not audio[:, 19200:].any()


# Tokens.


@pytest.fixture
def cache():
    """Every token says where it stands: clip * 1000 + semantic moment."""
    moment = torch.arange(10, dtype=torch.int16)
    clip = 1000 * torch.arange(4, dtype=torch.int16)[:, None]
    semantic = clip + moment
    return TokenCache(
        semantic=semantic,
        acoustic=semantic.repeat_interleave(2, dim=1)[:, :, None].repeat(1, 1, 3),
        audio_conditioning=(clip // 1000).repeat(1, 2),
        text_conditioning=torch.tensor([[10, 10], [10, 11], [11, 0], [12, 0], [13, 0]]).short(),
        first_caption=torch.tensor([0, 2, 3, 4, 5]),
        tempo_bpm=torch.tensor([60.0, 61.0, 62.0, 63.0]),
    )


ASK = {"size": 32, "frames": 8, "stride": 2, "text_share": 0.5, "seed": 0}


def test_a_batch_of_tokens_is_a_function_of_seed_and_step(cache):
    batch = cache.batch(**ASK, step=5)
    assert [tuple(rows.shape) for rows in batch] == [(32, 2), (32, 4), (32, 8, 3), (32,)]
    assert all(rows.dtype == torch.int64 for rows in batch[:3])
    assert all(torch.equal(a, b) for a, b in zip(batch, cache.batch(**ASK, step=5), strict=True))
    assert not torch.equal(batch[1], cache.batch(**ASK, step=6)[1])
    assert not torch.equal(batch[1], cache.batch(**{**ASK, "seed": 1}, step=5)[1])


def test_all_tokens_of_a_row_are_of_one_clip_and_moment(cache):
    conditioning, semantic, acoustic, tempo_bpm = cache.batch(**ASK, step=0)
    assert torch.equal(acoustic[:, ::2, 0], semantic)
    assert torch.equal(acoustic[:, 1::2, 2], semantic)
    assert (semantic.diff(dim=1) == 1).all()
    clips = semantic[:, 0] // 1000
    assert torch.equal(conditioning[:, 0] % 10, clips)
    assert torch.equal(tempo_bpm, 60.0 + clips)
    from_text = conditioning[:, 0] >= 10
    assert 5 < from_text.sum() < 27
    starts = semantic[:, 0] % 1000
    assert starts.min() == 0 and starts.max() == 6  # the first and the last place there is


def test_every_caption_of_a_clip_is_drawn(cache):
    conditioning, semantic, *_ = cache.batch(**{**ASK, "size": 200, "text_share": 1.0}, step=0)
    first = conditioning[semantic[:, 0] // 1000 == 0]
    assert {tuple(row) for row in first.tolist()} == {(10, 10), (10, 11)}


@pytest.mark.parametrize("share, lowest", [(0.0, 0), (1.0, 10)])
def test_text_share_at_its_ends(cache, share, lowest):
    conditioning, *_ = cache.batch(**{**ASK, "text_share": share}, step=0)
    assert (conditioning[:, 0] // 10 == lowest // 10).all()


@pytest.mark.parametrize("frames", [22, 0, 1])
def test_a_crop_that_no_clip_holds_is_refused(cache, frames):
    assert cache.batch(**{**ASK, "frames": 20}, step=0)[1].shape == (32, 10)
    with pytest.raises(ValueError, match=f"a crop is {frames} frames, wanted 2 to 20"):
        cache.batch(**{**ASK, "frames": frames}, step=0)


def test_a_token_cache_comes_back(cache, tmp_path):
    cache.save(tmp_path / "train.safetensors")
    again = TokenCache.load(tmp_path / "train.safetensors")
    assert all(torch.equal(value, vars(cache)[name]) for name, value in vars(again).items())
    write_tensors(tmp_path / "old.safetensors", {"semantic": cache.semantic})
    with pytest.raises(ValueError, match="old.safetensors is of another version: remove it"):
        TokenCache.load(tmp_path / "old.safetensors")


# A whole set.


def test_all_models_are_trained_and_make_music(trained, tiny_config, tmp_path):
    run_dir, told = trained
    for name in MODELS:
        assert (run_dir / name / "model.json").exists()
        what, done, total, _ = told[name][-1]
        assert what == name and done == total
    for name in ("codec", "tempo_reader", "semantic", "coarse", "fine"):
        figures = told[name][-1][3]
        assert {"train/loss", "validation/loss"} <= figures.keys()
    assert 0 <= told["mulan"][-1][3]["validation/retrieval_auc"] <= 1
    assert {"validation/level_0", "validation/level_1"} <= told["coarse"][-1][3].keys()
    assert [what for what, *_ in told["semantic"]].count("tokens") == 2  # of both splits, once
    assert not any(what == "tokens" for what, *_ in told["fine"])

    model = bundle_run(run_dir, config=str(tiny_config))
    assert model.audiolm.windows == Windows(1.0, 0.5, 0.2)
    assert model.sampling.semantic == Sampling(temperature=0.9, top_k=6)
    for stage in (model.audiolm.semantic, model.audiolm.coarse, model.audiolm.fine):
        codes = stage.condition_embedding.codes.weight.view(
            stage.conditioning_length, -1, model.quantizer.dim
        )
        torch.testing.assert_close(codes[:, :-1], model.quantizer.codebooks, rtol=1e-3, atol=1e-6)
        assert not codes[:, -1].any()
    model.save_pretrained(tmp_path / "bundle", dtype=torch.int8)
    made = (
        type(model)
        .from_pretrained(tmp_path / "bundle")
        .generate("a hymn", seconds=1.0, num_samples=2)
    )
    assert made.audio.shape == (1, 2, 16000) and torch.isfinite(made.audio).all()


def test_token_caches_are_the_models_own_tokens(trained, tiny_corpus):
    run_dir, _ = trained
    from musiclm_engine.components import load_component

    cache = TokenCache.load(run_dir / "tokens" / "train.safetensors")
    parts = {name: load_component(name, run_dir / name / "model") for name in MODELS[:4]}
    clips = load_manifest(tiny_corpus, "train")
    audio = torch.stack([load_audio(clip.audio, 16000) for clip in clips])
    assert torch.equal(cache.acoustic.long(), parts["codec"].encode(audio))
    assert torch.equal(cache.semantic.long(), parts["tokenizer"].encode(audio))
    with torch.inference_mode():
        texts = parts["mulan"].embed_text([c for clip in clips for c in clip.captions])
        sounds = parts["mulan"].embed_audio(audio)
    assert torch.equal(cache.text_conditioning.long(), parts["quantizer"].encode(texts))
    assert torch.equal(cache.audio_conditioning.long(), parts["quantizer"].encode(sounds))
    assert cache.first_caption.tolist() == [0, 2, 4, 6, 8]
    assert cache.tempo_bpm.tolist() == [60.0, 80.0, 100.0, 120.0]


@pytest.mark.parametrize("name", ["codec", "mulan"])
def test_the_same_seed_trains_the_same_model(trained, name, tiny_config, tiny_corpus, tmp_path):
    run_dir, _ = trained
    torch.manual_seed(12345)  # whatever went before
    train_one(name, tiny_config, tiny_corpus, tmp_path)
    first, second = (
        read_tensors(folder / name / "model.safetensors") for folder in (run_dir, tmp_path)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_trained_model_is_not_trained_again(trained, tiny_config, tiny_corpus):
    run_dir, _ = trained
    path = run_dir / "coarse" / "model.safetensors"
    before = path.read_bytes()
    assert train_one("coarse", tiny_config, tiny_corpus, run_dir) == []
    assert path.read_bytes() == before


def test_what_is_fitted_is_left_alone(trained, tiny_config, tiny_corpus):
    run_dir, _ = trained
    for name in ("tokenizer", "quantizer"):
        path = run_dir / name / "model.safetensors"
        before = path.stat().st_mtime_ns
        train_one(name, tiny_config, tiny_corpus, run_dir)
        assert path.stat().st_mtime_ns == before


def test_tokens_older_than_their_makers_are_made_again(trained, tiny_config, tiny_corpus, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "tokens" / "validation.safetensors"
    os.utime(path, (0, 0))
    (tmp_path / "run" / "fine" / "checkpoint.safetensors").unlink()
    train_one("fine", tiny_config, tiny_corpus, tmp_path / "run")
    assert path.stat().st_mtime > 0


@pytest.fixture
def beside(trained, tiny_config, tmp_path):
    """beside(old, new): another configuration, and a run that has all but the stages."""

    def make(old, new):
        text = tiny_config.read_text()
        assert old in text
        (tmp_path / "other.toml").write_text(text.replace(old, new))
        (tmp_path / "run").mkdir()
        for name in (*MODELS[:4], "tokens"):
            (tmp_path / "run" / name).symlink_to(trained[0] / name)
        return tmp_path / "other.toml", tmp_path / "run"

    return make


def test_every_other_batch_may_be_of_short_crops(beside, tiny_corpus, monkeypatch):
    config, run_dir = beside("[semantic]\nsteps = 2", "[semantic]\nsteps = 3\nshort_crops = 5")
    batches, batch = [], TokenCache.batch

    def drawn(cache, *, size, frames, **others):
        batches.append((size, frames))
        return batch(cache, size=size, frames=frames, **others)

    monkeypatch.setattr(TokenCache, "batch", drawn)
    train_one("semantic", config, tiny_corpus, run_dir)
    whole, short = (2, 25), (10, 5)  # crops, frames
    assert batches[:3] == [whole, short, whole] and set(batches[3:]) == {whole}


@pytest.mark.parametrize("value", ["0", "1.5", "true"])
def test_short_crops_that_are_no_number_of_crops_are_refused(beside, tiny_corpus, value):
    config, run_dir = beside("[coarse]", f"[coarse]\nshort_crops = {value}")
    with pytest.raises(
        ConfigError, match=r"\[coarse\] has short_crops = .*, wanted a whole number"
    ):
        train_one("coarse", config, tiny_corpus, run_dir)


def test_beats_need_clips_of_known_tempo(beside, tiny_corpus):
    config, run_dir = beside("counts_beats = true", "counts_beats = true  # and no tempo")
    tokens = run_dir / "tokens"
    made = tokens.resolve()
    tokens.unlink()
    tokens.mkdir()
    for path in made.iterdir():
        cache = TokenCache.load(path)
        replace(cache, tempo_bpm=torch.zeros_like(cache.tempo_bpm)).save(tokens / path.name)
    with pytest.raises(ConfigError, match="counts_beats = true, wanted false for clips without"):
        train_one("semantic", config, tiny_corpus, run_dir)
    config.write_text(config.read_text().replace("counts_beats = true", "counts_beats = false"))
    train_one("semantic", config, tiny_corpus, run_dir)
    train_one("coarse", config, tiny_corpus, run_dir)  # which counts frames


def test_a_missing_table_is_told_before_any_training(tiny_config, tiny_corpus, tmp_path):
    path = tmp_path / "without.toml"
    before, _, rest = tiny_config.read_text().partition("[tempo_reader]")
    path.write_text(before + rest[rest.index("[semantic]") :])
    with pytest.raises(ConfigError, match="has no \\[tempo_reader\\]"):
        train_one("all", path, tiny_corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_longer_crop_than_the_clips_is_refused(beside, tiny_corpus):
    config, run_dir = beside("crop_seconds = 0.2", "crop_seconds = 9.0")
    with pytest.raises(ValueError, match="a crop is 225 frames, wanted 1 to 30"):
        train_one("fine", config, tiny_corpus, run_dir)


def test_what_was_not_trained_before_is_named(tiny_config, tiny_corpus, tmp_path):
    with pytest.raises(CheckpointError, match="has no mulan yet: run `musiclm train mulan`"):
        train_one("quantizer", tiny_config, tiny_corpus, tmp_path)
    with pytest.raises(CheckpointError, match="has no codec yet"):
        train_one("fine", tiny_config, tiny_corpus, tmp_path)
    with pytest.raises(CheckpointError, match="codec/model.json is missing"):
        bundle_run(tmp_path, config=str(tiny_config))


def test_no_manifest_and_no_split_are_named(tiny_config, tiny_corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        train_one("codec", tiny_config, tmp_path / "nowhere.jsonl", tmp_path)
    lines = tiny_corpus.read_text().replace("validation", "test")
    manifest = tiny_corpus.with_name("no-validation.jsonl")
    manifest.write_text(lines)
    with pytest.raises(ManifestError, match="no clips in split 'validation'"):
        train_one("codec", tiny_config, manifest, tmp_path)


def test_sampling_settings_that_do_not_exist_are_named(trained, tiny_config, tmp_path):
    run_dir, _ = trained
    path = tmp_path / "odd.toml"
    path.write_text(tiny_config.read_text().replace("top_k = 6", "top_kk = 6"))
    with pytest.raises(ConfigError, match="sampling in .*odd.toml is not understood: .*top_kk"):
        bundle_run(run_dir, config=str(path))


def test_the_waveform_codec_is_trained_too(tiny_corpus, tmp_path):
    path = tmp_path / "wave.toml"
    path.write_text(
        "[codec]\ndomain = 'waveform'\nsteps = 1\nbatch_size = 1\ncrop_seconds = 0.1\n"
        "model = { channels = 2, strides = [4, 8], codebook_dim = 4, codebook_size = 8, "
        "rq_num_quantizers = 2 }\n"
    )
    assert tomllib.loads(path.read_text())["codec"]["domain"] == "waveform"
    train_one("codec", path, tiny_corpus, tmp_path)
    from musiclm_engine.components import load_component

    assert isinstance(load_component("codec", tmp_path / "codec" / "model"), SoundStream)
