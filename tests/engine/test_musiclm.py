"""Text in, music out: the whole model, at width 16 with random weights."""

import json
import math
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from musiclm_engine import MuLaNEmbedQuantizer, MusicLM, SemanticTokenizer
from musiclm_engine.checkpoint import CheckpointError, save_model
from musiclm_engine.generation import Decoding, Sampling, StageSampling
from musiclm_engine.musiclm import (
    available_bytes,
    check_device,
    fingerprint,
    merge_settings,
    write_usual_similarity,
)

HYMN, JIG = "slow a hymn on church organ", "quick a jig on flute"
GOLDEN = Path(__file__).parent / "golden" / "musiclm.json"


@pytest.fixture(scope="module")
def two(tiny_musiclm):
    return tiny_musiclm.generate([HYMN, JIG], seconds=0.5, num_samples=3, seed=0)


def test_shapes(two):
    assert two.audio.shape == (2, 3, 8000) and two.audio.dtype == torch.float32
    assert two.audio.abs().max() <= 1 and two.sample_rate == 16000
    assert two.scores.shape == two.sample_seeds.shape == (2, 3)
    assert {name: tuple(tokens.shape) for name, tokens in two.tokens.items()} == {
        "mulan": (2, 2),
        "semantic": (2, 3, 13),
        "coarse": (2, 3, 26, 2),
        "fine": (2, 3, 26, 1),
    }


def test_best_candidate_first_with_all_that_is_its_own(tiny_musiclm, two):
    assert (two.scores.diff(dim=1) <= 0).all()
    for p, prompt in enumerate([HYMN, JIG]):
        wanted = tiny_musiclm.mulan.similarity(two.audio[p], [prompt])[:, 0]
        torch.testing.assert_close(two.scores[p], wanted)
        codes = torch.cat([two.tokens["coarse"][p], two.tokens["fine"][p]], dim=2)
        decoded = tiny_musiclm.audiolm.codec.decode(codes)[:, :8000]
        torch.testing.assert_close(two.audio[p], decoded, rtol=0, atol=1e-4)
    assert two.sample_seeds[0].sort().values.tolist() == two.sample_seeds[1].sort().values.tolist()


def test_a_candidate_depends_on_its_prompt_number_and_seed_alone(tiny_musiclm, two):
    alone = tiny_musiclm.generate(JIG, seconds=0.5, num_samples=1, seed=0)
    place = two.sample_seeds[1].tolist().index(alone.sample_seeds[0, 0].item())
    for name in ("semantic", "coarse", "fine"):
        assert torch.equal(alone.tokens[name][0, 0], two.tokens[name][1, place]), name
    torch.testing.assert_close(alone.audio[0, 0], two.audio[1, place], rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_music(tiny_musiclm, two):
    again = tiny_musiclm.generate([HYMN, JIG], seconds=0.5, num_samples=3, seed=0)
    assert torch.equal(again.audio, two.audio) and torch.equal(again.scores, two.scores)
    other = tiny_musiclm.generate([HYMN, JIG], seconds=0.5, num_samples=3, seed=1)
    assert not torch.equal(other.tokens["semantic"], two.tokens["semantic"])


def test_a_prompt_may_stand_alone_or_in_any_sequence(tiny_musiclm):
    alone = tiny_musiclm.generate(HYMN, seconds=0.1, num_samples=1)
    for prompts in ([HYMN], (HYMN,)):
        assert torch.equal(
            tiny_musiclm.generate(prompts, seconds=0.1, num_samples=1).audio, alone.audio
        )
    assert alone.audio.shape == (1, 1, 1600)


def test_prompts_matter(two):
    assert not torch.equal(two.tokens["mulan"][0], two.tokens["mulan"][1])
    assert not torch.equal(two.tokens["semantic"][0], two.tokens["semantic"][1])


def test_training_mode_changes_no_music(tiny_musiclm, two):
    """A model just built is in training mode, where MuLaN drops patches at random."""
    tiny_musiclm.train()
    try:
        made = tiny_musiclm.generate([HYMN, JIG], seconds=0.5, num_samples=3, seed=0)
        assert tiny_musiclm.training and tiny_musiclm.mulan.audio.training
    finally:
        tiny_musiclm.eval()
    assert torch.equal(made.scores, two.scores) and torch.equal(made.audio, two.audio)


def test_golden(tiny_musiclm):
    """What this very model made when the file was written: MUSICLM_WRITE_GOLDEN=1 writes it.

    Tokens are exact; samples have passed an FFT, which libraries round differently.
    """
    made = tiny_musiclm.generate(HYMN, seconds=0.5, num_samples=2, seed=7, guidance=2.0)
    found = {
        "tokens": {name: tokens.tolist() for name, tokens in made.tokens.items()},
        "sample_seeds": made.sample_seeds.tolist(),
        "scores": made.scores.tolist(),
        "audio": made.audio[0, :, 2000:2032].tolist(),
    }
    if os.environ.get("MUSICLM_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found) + "\n")
    wanted = json.loads(GOLDEN.read_text())
    assert found["tokens"] == wanted["tokens"]
    assert found["sample_seeds"] == wanted["sample_seeds"]
    for name in ("scores", "audio"):
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(wanted[name]), rtol=0, atol=1e-3
        )


# Settings.


def test_settings_go_to_their_stage(tiny_musiclm):
    base = tiny_musiclm.sampling
    merged = merge_settings(base, {"semantic_temperature": 0.5, "fine_top_k": 3})
    assert merged == StageSampling(
        semantic=Sampling(temperature=0.5, top_k=8),
        coarse=base.coarse,
        fine=Sampling(min_p=0.01, top_k=3),
    )


def test_a_setting_for_all_gives_way_to_one_for_a_stage():
    wanted = merge_settings(StageSampling(), {"coarse_guidance": 3.0, "guidance": 2.0})
    assert wanted == merge_settings(StageSampling(), {"guidance": 2.0, "coarse_guidance": 3.0})
    assert (wanted.semantic.guidance, wanted.coarse.guidance, wanted.fine.guidance) == (2, 3, 2)


@pytest.mark.parametrize(
    "name", ["temprature", "semantic_temprature", "vocal_temperature", "semantic", "_top_k", ""]
)
def test_a_setting_that_does_not_exist_is_refused(tiny_musiclm, name):
    with pytest.raises(ValueError, match=f"^{name} is no setting; wanted one of guidance, min_p"):
        tiny_musiclm.generate(HYMN, seconds=0.1, **{name: 1.0})


def test_a_setting_out_of_range_is_refused(tiny_musiclm):
    with pytest.raises(ValueError, match="top_p is 1.5"):
        tiny_musiclm.generate(HYMN, seconds=0.1, coarse_top_p=1.5)


def test_a_setting_reaches_the_sampling(tiny_musiclm):
    greedy = tiny_musiclm.generate(HYMN, seconds=0.1, num_samples=2, temperature=0.0)
    assert torch.equal(greedy.tokens["fine"][0, 0], greedy.tokens["fine"][0, 1])
    assert torch.equal(greedy.audio[0, 0], greedy.audio[0, 1])


# Refusals.


@pytest.mark.parametrize("prompts", ["", "  \n", [], ["hymn", ""], [None], ["hymn", 3]])
def test_prompts_without_text_are_refused(tiny_musiclm, prompts):
    with pytest.raises(ValueError, match="prompts"):
        tiny_musiclm.generate(prompts, seconds=0.1)


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, 1e-7])
def test_lengths_that_are_none_are_refused(tiny_musiclm, seconds):
    with pytest.raises(ValueError, match="seconds is"):
        tiny_musiclm.generate(HYMN, seconds=seconds)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_samples_are_refused(tiny_musiclm, num_samples):
    with pytest.raises(ValueError, match="num_samples is"):
        tiny_musiclm.generate(HYMN, seconds=0.1, num_samples=num_samples)


@pytest.mark.parametrize("much", [{"seconds": 1e9}, {"seconds": 1e300}, {"num_samples": 10**9}])
def test_more_than_fits_into_memory_is_refused_at_once(tiny_musiclm, much):
    with pytest.raises(MemoryError, match="GiB are free: ask for fewer seconds or samples"):
        tiny_musiclm.generate(HYMN, **much)


@pytest.fixture
def caches(monkeypatch):
    """The bytes of every cache that is made, in order."""
    from musiclm_engine.generation.cache import KVCache

    made, empty = [], KVCache.empty

    def watch(**sizes):
        cache = empty(**sizes)
        made.append(sum(t.nbytes for layer in cache.layers for t in layer if t is not None))
        return cache

    monkeypatch.setattr(KVCache, "empty", watch)
    return made


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.3])  # within all windows; over some; over all
@pytest.mark.parametrize("is_kept", [False, True])
def test_the_caches_are_foreseen(tiny_musiclm, caches, monkeypatch, seconds, is_kept):
    """The largest, or all three where steps are kept, and then nothing for the next piece."""
    from musiclm_engine.generation import stage_steps

    monkeypatch.setattr(stage_steps, "is_on_gpu", lambda stage: is_kept)
    audiolm = deepcopy(tiny_musiclm.audiolm)
    sampling = StageSampling(coarse=Sampling(guidance=2.0))
    foreseen = {
        "seconds": seconds, "rows": 2, "sampling": sampling,
        "decoding": Decoding(cache_dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    wanted = audiolm.cache_bytes(**foreseen)
    arguments = {key: value for key, value in foreseen.items() if key != "rows"}
    conditioning, seeds = torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 2])
    audiolm.generate(conditioning, seeds=seeds, **arguments)
    assert wanted == (sum(caches) if is_kept else max(caches))
    assert audiolm.cache_bytes(**foreseen) == (0 if is_kept else wanted)


def test_a_gpu_that_runs_out_is_a_memory_error(tiny_musiclm, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny_musiclm.audiolm, "generate", fails)
    with pytest.raises(MemoryError, match="CUDA out of memory; ask for fewer seconds or samples"):
        tiny_musiclm.generate(HYMN, seconds=0.1)


def test_memory_that_the_system_would_give_back_counts_as_free(tmp_path):
    """After reading a corpus nearly all memory is file cache: MemFree is small, nothing is full."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       32000000 kB\nMemFree:          100000 kB\nMemAvailable:   30000000 kB\n"
    )
    assert available_bytes(meminfo) == 30000000 * 1024
    assert available_bytes(tmp_path / "not-linux") > 2**20
    assert available_bytes() > 2**20


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99"])
def test_cuda_where_none_is_is_refused(tiny_folder, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=f"'{device}', but there are 0 CUDA devices"):
        MusicLM.from_pretrained(tiny_folder, device=device)


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "cuda:x", "", "meta", "mps"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device is '{device}', wanted cpu, cuda or cuda:N"):
        check_device(device)


# On disk.


def test_float32_weights_come_back_exactly(tiny_musiclm, tiny_folder, two):
    again = MusicLM.from_pretrained(tiny_folder)
    assert not again.training and again.sampling == tiny_musiclm.sampling
    assert again.audiolm.windows == tiny_musiclm.audiolm.windows
    made = again.generate([HYMN, JIG], seconds=0.5, num_samples=3, seed=0)
    assert torch.equal(made.audio, two.audio) and torch.equal(made.scores, two.scores)


def test_float16_weights_are_nearly_the_same_model(tiny_musiclm, tmp_path):
    tiny_musiclm.save_pretrained(tmp_path)
    again = MusicLM.from_pretrained(str(tmp_path))
    for name, value in again.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64, torch.bool), name
        torch.testing.assert_close(
            value, tiny_musiclm.state_dict()[name], rtol=1e-3, atol=1e-6, msg=name
        )
    codes = torch.randint(16, (1, 25, 3), generator=torch.Generator().manual_seed(0))
    wanted = tiny_musiclm.audiolm.codec.decode(codes)
    difference = again.audiolm.codec.decode(codes) - wanted
    assert difference.norm() < 0.02 * wanted.norm()


def test_a_folder_is_two_files_a_part_and_one_of_settings(tiny_folder):
    parts = ("codec", "tokenizer", "mulan", "quantizer", "semantic", "coarse", "fine")
    wanted = {f"{part}.{kind}" for part in parts for kind in ("json", "safetensors")}
    assert {path.name for path in tiny_folder.iterdir()} == wanted | {"musiclm.json"}


@pytest.fixture
def copy(tiny_folder, tmp_path):
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "name", ["musiclm.json", "mulan.json", "codec.safetensors", "fine.safetensors"]
)
def test_a_missing_or_truncated_file_is_named(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=name):
        MusicLM.from_pretrained(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        MusicLM.from_pretrained(copy)


def test_a_folder_without_a_model_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"{path}/musiclm.json is missing"):
            MusicLM.from_pretrained(path)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": {"semantic_seconds": -1}},
        {"windows": {"minutes": 1}},
        {"windows": 3},
        {"sampling": {}},
        {"sampling": {"semantic": {"heat": 1}, "coarse": {}, "fine": {}}},
        {"sampling": {"semantic": {"temperature": -1}, "coarse": {}, "fine": {}}},
        {"usual_similarity": 1.5},
        {"usual_similarity": float("nan")},
        {"usual_similarity": "high"},
        {"usual_similarity": True},
    ],
)
def test_settings_that_make_no_sense_are_named(copy, change):
    description = json.loads((copy / "musiclm.json").read_text())
    (copy / "musiclm.json").write_text(json.dumps(description | change))
    with pytest.raises(CheckpointError, match="musiclm.json is not understood"):
        MusicLM.from_pretrained(copy)


def test_a_usual_similarity_is_kept_and_makes_no_other_model(tiny_folder, copy, tmp_path):
    assert MusicLM.from_pretrained(copy).usual_similarity is None
    before = fingerprint(copy)
    write_usual_similarity(copy, 0.25)
    model = MusicLM.from_pretrained(copy)
    assert model.usual_similarity == 0.25
    write_usual_similarity(copy, 0.5)
    assert fingerprint(copy) == before == fingerprint(tiny_folder)
    model.save_pretrained(tmp_path / "again", dtype=torch.float32)
    assert MusicLM.from_pretrained(tmp_path / "again").usual_similarity == 0.25
    assert fingerprint(tmp_path / "again") == before
    for wrong in (2.0, float("nan"), True):
        with pytest.raises(ValueError, match=f"usual_similarity is {wrong}, wanted a number"):
            write_usual_similarity(copy, wrong)
    with pytest.raises(CheckpointError, match="musiclm.json is missing"):
        write_usual_similarity(tmp_path / "nowhere", 0.5)
    description = json.loads((copy / "musiclm.json").read_text())
    description["sampling"]["fine"]["temperature"] = 0.3
    (copy / "musiclm.json").write_text(json.dumps(description))
    assert fingerprint(copy) != before


def test_parts_of_two_models_are_refused(tiny_musiclm, copy):
    """Each part loads; together they would make noise."""
    stray = MuLaNEmbedQuantizer(16, num_quantizers=2, codebook_size=4)
    stray.fit(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), seed=0)
    own = {name: getattr(tiny_musiclm, name) for name in ("mulan", "tokenizer", "audiolm")}
    with pytest.raises(ValueError, match="quantizer gives 2 tokens of 4 values, .* take 2 of 8"):
        MusicLM(**own, quantizer=stray, sampling=StageSampling())
    save_model(stray, copy / "quantizer")
    with pytest.raises(CheckpointError, match=f"{copy} .*quantizer gives 2 tokens of 4 values"):
        MusicLM.from_pretrained(copy)


def test_parts_of_two_sample_rates_are_refused(tiny_musiclm):
    own = {name: getattr(tiny_musiclm, name) for name in ("mulan", "quantizer", "audiolm")}
    slow = SemanticTokenizer(num_tokens=12, num_components=8, sample_rate_hz=8000)
    with pytest.raises(ValueError, match="tokenizer takes 8000 Hz, the codec gives 16000 Hz"):
        MusicLM(**own, tokenizer=slow, sampling=StageSampling())
    other = SemanticTokenizer(num_tokens=12, num_components=8, hop_length=320)
    with pytest.raises(ValueError, match="tokenizer's tokens last 320 samples, .* wants 640"):
        MusicLM(**own, tokenizer=other, sampling=StageSampling())
    more = SemanticTokenizer(num_tokens=13, num_components=8)
    with pytest.raises(ValueError, match="tokenizer has 13 tokens, the semantic stage 12"):
        MusicLM(**own, tokenizer=more, sampling=StageSampling())
