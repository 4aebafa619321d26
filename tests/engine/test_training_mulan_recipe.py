"""MuLaN's recipe: the contrast alone, and with facts of the manifest beside it."""

import pytest
import torch

from musiclm_engine.audio import save_audio
from musiclm_engine.data.manifest import Clip, write_manifest
from musiclm_engine.training.config import load_config
from musiclm_engine.training.learner import Learner, descend
from musiclm_engine.training.mulan_recipe import mulan_recipe
from musiclm_engine.training.schedule import Schedule
from musiclm_engine.training.workplace import Workplace

INSTRUMENTS = ("flute", "organ")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, tones):
    """Eight clips, high ones on a flute and low ones on an organ, two captions each."""
    folder = tmp_path_factory.mktemp("facts")
    clips = []
    for n in range(8):
        high = n % 2
        path = folder / f"{n}.wav"
        save_audio(path, tones(0.7, 1500.0 + 9 * n if high else 200.0 + 9 * n), 16000)
        instrument = INSTRUMENTS[1 - high]
        clips.append(
            Clip(
                path,
                0.7,
                (f"music {n} on {instrument}", f"music {n}"),
                "train" if n < 6 else "validation",
                f"piece {n}",
                {"instrument": instrument, "tempo_bpm": 60 + 10 * n},
                (frozenset({"instrument"}), frozenset()),
            )
        )
    return write_manifest(folder / "manifest.jsonl", clips)


def recipe(manifest, tiny_config, tmp_path, facts):
    path = tmp_path / "facts.toml"
    path.write_text(
        f'extends = "{tiny_config}"\n[mulan]\nbatch_size = 6\nfacts = {facts}\ndim_latent = 32\n'
    )
    torch.manual_seed(0)
    return mulan_recipe(Workplace(tmp_path, manifest, load_config(str(path)), torch.device("cpu")))


def test_without_facts_it_is_the_contrast_alone(manifest, tiny_config, tmp_path):
    made = recipe(manifest, tiny_config, tmp_path, "[]")
    assert made.losses(0).keys() == {"loss"}
    assert made.validation().keys() == {"retrieval_auc"}


def test_with_facts_both_towers_learn_them(manifest, tiny_config, tmp_path):
    made = recipe(manifest, tiny_config, tmp_path, '["instrument", "tempo_bpm"]')
    first = made.losses(0)
    torch.testing.assert_close(
        first["loss"], first["contrast"] + first["hearing"] + first["reading"]
    )
    schedule = Schedule(steps=60, learning_rate=1e-2)
    learner = Learner(made.model, schedule)
    for step in range(60):
        descend([learner], made.losses(step), rate=1e-2, clip=1.0)
    made.model.eval()
    with torch.no_grad():
        figures = made.validation()
    assert figures["heard_instrument"] == 1
    assert figures["read_instrument"] == 1
    assert figures["read_tempo_bpm"] == 0  # no caption states one: nothing to count


def test_the_model_knows_the_words_of_its_captions(manifest, tiny_config, tmp_path):
    model = recipe(manifest, tiny_config, tmp_path, "[]").model
    assert model.words == ["0", "1", "2", "3", "4", "5", "flute", "music", "on", "organ"]
    assert model.unseen_words("Heavy metal on flute, heavy music") == ["heavy", "metal"]
    again = type(model).from_config(model.config)
    assert again.words == model.words


def test_a_model_that_does_not_know_its_words_has_no_unseen_ones(tiny_musiclm):
    assert tiny_musiclm.mulan.words == []
    assert tiny_musiclm.mulan.unseen_words("heavy metal") == []
