"""What a reader of tempi is trained on: clips' own tempi, other numbers, and numbers that are none."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch

from musiclm_engine import TextTransformer
from musiclm_engine.audiolm.beat_clock import tempo_tokens
from musiclm_engine.checkpoint import CheckpointError, save_model
from musiclm_engine.data.manifest import Clip, ManifestError
from musiclm_engine.mulan import train_caption_tokenizer
from musiclm_engine.tempo_reader import TempoReader
from musiclm_engine.training.bundle import bundle_run
from musiclm_engine.training.config import ConfigError, load_config, models_of
from musiclm_engine.training.run import Limits
from musiclm_engine.training.tempo_recipe import (
    NUMBER,
    USUAL_BPM,
    Draw,
    _restated,
    _with_strays,
    tempo_recipe,
)
from musiclm_engine.training.workplace import Workplace
from tests.engine.training_runs import train_one

ROWS = 1000


def restated(caption, bpm):
    draw = Draw([caption] * ROWS, [bpm] * ROWS, [True] * ROWS)
    return _restated(draw, np.random.default_rng(0))


@pytest.mark.parametrize("said", [104, 105, 102])
def test_half_of_the_tempi_are_others(said):
    draw = restated(f"a reel in 6/8, opus 12, at about {said} bpm", 104.0)
    others = [bpm for bpm in draw.bpm if bpm != 104.0]
    assert 0.4 * ROWS < len(others) < 0.6 * ROWS
    usual = [bpm for bpm in others if USUAL_BPM[0] <= bpm <= USUAL_BPM[1]]
    assert 0.8 < len(usual) / len(others) < 0.95 and min(others) < 10 and max(others) > 1000
    middle = math.sqrt(math.prod(USUAL_BPM))
    assert 0.4 < np.mean(np.array(usual) < middle) < 0.6  # half of them in half of the octaves
    for caption, bpm in zip(draw.captions, draw.bpm, strict=True):
        number = int(caption.split()[-2])
        assert caption == f"a reel in 6/8, opus 12, at about {number} bpm"
        assert number == bpm or (number == said and bpm == 104.0)


@pytest.mark.parametrize(
    "caption",
    [
        *("a slow air", "a waltz in 3/4", "opus 96: a reel at a lively tempo", "at 120 bpm"),
        *("psalm 104 at 104 bpm", "take 105 at 104 bpm"),  # which is it?
    ],
)
def test_other_numbers_are_left_alone(caption):
    draw = restated(caption, 104.0)
    assert draw.captions == [caption] * ROWS and draw.bpm == [104.0] * ROWS


def test_a_caption_that_states_no_tempo_has_none():
    draw = Draw(["psalm 104"] * ROWS, [104.0] * ROWS, [False] * ROWS)
    assert _restated(draw, np.random.default_rng(0)) == draw
    unknown = Draw(draw.captions, draw.bpm, [None] * ROWS)
    assert _restated(unknown, np.random.default_rng(0)) != unknown


def test_stray_numbers_leave_the_tempo_as_it_is():
    draw = Draw(["a reel at 104 bpm"] * ROWS, [104.0] * ROWS, [True] * ROWS)
    strayed = _with_strays(draw, np.random.default_rng(0))
    assert strayed.bpm == draw.bpm and strayed.stated == draw.stated
    others = [caption for caption in strayed.captions if caption != draw.captions[0]]
    assert 0.15 * ROWS < len(others) < 0.35 * ROWS
    assert all("a reel at 104 bpm" in caption for caption in others)
    assert all(len(NUMBER.findall(caption)) == 2 for caption in others)
    ahead = [caption for caption in others if not caption.startswith("a reel")]
    assert 0.3 < len(ahead) / len(others) < 0.7


BPM = {"train": (60, 100, 140), "validation": (50, 80, 200)}


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """By split what the recipe gives its model to read, and what its loss wants, of 9 batches."""
    config = load_config("tiny")
    config["tempo_reader"] |= {"text": {"dim": 16, "depth": 1, "heads": 1}, "batch_size": 64}
    place = Workplace(tmp_path, tmp_path / "manifest.jsonl", config, torch.device("cpu"))
    for split, tempi in BPM.items():
        place._clips[split] = [
            Clip(tmp_path / "a", 1.0, (f"at {bpm} bpm",), split, "a", {"tempo_bpm": bpm})
            for bpm in tempi
        ]
    given = []

    def read(reader, captions):
        given.append(captions)
        return torch.zeros(len(captions), 104, requires_grad=True)

    monkeypatch.setattr(TempoReader, "forward", read)
    wanted, entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "musiclm_engine.training.tempo_recipe.F.cross_entropy",
        lambda logits, tokens: wanted.append(tokens.tolist()) or entropy(logits, tokens),
    )
    recipe = tempo_recipe(place)
    for step in range(9):
        recipe.losses(step)
    of_train = list(chain(*given)), list(chain(*wanted))
    given.clear(), wanted.clear()
    recipe.validation()
    return {"train": of_train, "validation": (list(chain(*given)), list(chain(*wanted)))}


def number_in(caption):
    return int(caption.partition(" bpm")[0].rpartition(" ")[2])


def test_training_is_on_all_numbers_within_what_clips_have(seen):
    captions, wanted = seen["train"]
    numbers = torch.tensor([number_in(caption) for caption in captions], dtype=torch.float64)
    assert tempo_tokens(numbers.clamp(60, 140)).tolist() == wanted
    assert (numbers < 60).any() and (numbers > 140).any() and len(numbers.unique()) > 60
    assert any(len(NUMBER.findall(caption)) == 2 for caption in captions)


def test_validation_is_on_captions_as_they_are(seen):
    captions, wanted = seen["validation"]
    assert set(captions) == {f"at {bpm} bpm" for bpm in BPM["validation"]}
    numbers = torch.tensor([number_in(caption) for caption in captions], dtype=torch.float64)
    assert tempo_tokens(numbers).tolist() == wanted


# Whole trainings of one, and of the sets that want one.


def test_a_reader_of_tempi_needs_captions_and_tempi_alone(tiny_config, tiny_corpus, tmp_path):
    told = train_one("tempo_reader", tiny_config, tiny_corpus, tmp_path / "run")
    assert "validation/read" not in told[-1][3]  # nothing says what these captions state
    rows = [json.loads(line) for line in tiny_corpus.read_text().splitlines()]
    manifest = tiny_corpus.with_name("stated.jsonl")

    def write():
        manifest.write_text("\n".join(map(json.dumps, rows)))

    for row in rows:
        row["stated"] = [["tempo_bpm"], []]
    write()
    told = train_one("tempo_reader", tiny_config, manifest, tmp_path / "stated")
    assert 0 <= told[-1][3]["validation/read"] <= 1
    for row in rows:
        row["stated"] = [["instrument"], []]
    write()
    told = train_one("tempo_reader", tiny_config, manifest, tmp_path / "other facts")
    assert "validation/read" not in told[-1][3]
    del rows[-1]["facts"]["tempo_bpm"]
    write()
    with pytest.raises(ManifestError, match=r"5.wav has no fact tempo_bpm, wanted it or"):
        train_one("all", tiny_config, manifest, tmp_path / "no tempo")
    assert not (tmp_path / "no tempo").exists()  # told before anything is trained


@pytest.mark.parametrize("tempo", ["fast", 0, True, 1e300])
def test_tempi_that_are_none_matter_to_sets_that_count_beats_alone(
    tiny_config, tiny_corpus, tmp_path, tempo
):
    rows = [json.loads(line) for line in tiny_corpus.read_text().splitlines()]
    rows[0]["facts"]["tempo_bpm"] = tempo
    manifest = tiny_corpus.with_name("odd-tempo.jsonl")
    manifest.write_text("\n".join(map(json.dumps, rows)))
    for name in ("all", "tempo_reader", "semantic"):
        with pytest.raises(ManifestError, match=r"tempo_bpm = .*, wanted beats a minute, 10 to"):
            train_one(name, tiny_config, manifest, tmp_path / "beats")
    config = tmp_path / "frames.toml"
    config.write_text(tiny_config.read_text().replace("beats = true", "beats = false"))
    train_one("all", config, manifest, tmp_path / "frames")
    assert bundle_run(tmp_path / "frames", config=str(config)).tempo_reader is None
    with pytest.raises(ConfigError, match="semantic counts frames, .* counts_beats = true: remove"):
        bundle_beats(tmp_path / "frames", tiny_config)


def bundle_beats(run_dir, config):
    """As if the run had a reader."""
    (run_dir / "tempo_reader").mkdir()
    reader = TempoReader(
        TextTransformer(16, 1, num_tokens=300, heads=1),
        tokenizer=train_caption_tokenizer(["a hymn"], 280),
    )
    save_model(reader, run_dir / "tempo_reader" / "model")
    return bundle_run(run_dir, config=str(config))


def test_other_captions_are_not_learnt_on_with_the_same_weights(tiny_config, tiny_corpus, tmp_path):
    """A vocabulary of the same size, whose tokens are others."""
    long = tmp_path / "long.toml"
    long.write_text(tiny_config.read_text().replace("vocab_size = 270", "vocab_size = 258"))
    run = {"config": long, "run_dir": tmp_path / "run", "limits": Limits(stop_at=0.0)}
    train_one("tempo_reader", manifest=tiny_corpus, **run)
    manifest = tiny_corpus.with_name("other-captions.jsonl")
    manifest.write_text(tiny_corpus.read_text().replace("hymn", "zzzzzzzz"))
    with pytest.raises(
        CheckpointError, match="holds another model .*: tokenizer came out otherwise"
    ):
        train_one("tempo_reader", manifest=manifest, **run)


def test_a_set_that_counts_frames_has_no_reader_of_tempi(tiny_corpus, tmp_path):
    assert "tempo_reader" in models_of(load_config("tiny"))
    assert "tempo_reader" not in models_of(load_config("recordings"))
    with pytest.raises(ConfigError, match="recordings has no .* counts_beats = true: nothing"):
        train_one("tempo_reader", "recordings", tiny_corpus, tmp_path)
