"""Labels from scores, and the recipes of the encoders beneath the semantic tokens."""

import math

import pytest
import torch

from musiclm_engine.audio import save_audio
from musiclm_engine.audiolm.best_rq import BestRQTokenizer
from musiclm_engine.audiolm.note_tokenizer import NoteTokenizer
from musiclm_engine.audiolm.semantic_tokenizer import SemanticTokenizer
from musiclm_engine.data.manifest import Clip, ManifestError, write_manifest
from musiclm_engine.training.config import ConfigError
from musiclm_engine.training.note_labels import note_labels
from musiclm_engine.training.semantic_recipe import semantic_encoder_recipe, unfitted_tokenizer
from musiclm_engine.training.workplace import Workplace

CPU = torch.device("cpu")
LOOP = {"batch_size": 3, "crop_seconds": 0.4, "steps": 2}
MODELS = {
    "notes": {"dim": 16, "depth": 1, "num_tokens": 4, "num_components": 4},
    "best-rq": {"dim": 16, "depth": 1, "feature_layer": 1, "heads": 2, "label_size": 8}
    | {"num_components": 4},
}


def clip(notes, instrument="flute", seconds=2.0):
    return Clip("x.wav", seconds, ("x",), "train", "x", {"instrument": instrument, "notes": notes})


def test_labels_against_the_score_frame_by_frame():
    notes = [[0.1, 0.9, 60], [0.3, 0.5, 48], [0.305, 0.3, 72], [1.2, 0.4, 60], [1.6, 0.4, 60]]
    labels = note_labels([clip([]), clip(notes, "organ")], ["organ", "flute"])
    of = labels.of(torch.tensor([1]), torch.tensor([0.08]), 40, 0.04)
    for frame in range(40):
        begin = round(0.08 + 0.04 * frame, 6)
        centre = round(begin + 0.02, 6)
        sounding = [p - 20 for on, length, p in notes if on <= centre < round(on + length, 6)] or [
            0
        ]
        assert of.melody[0, frame] == max(sounding) and of.bass[0, frame] == min(sounding)
        begun = any(begin <= on < round(begin + 0.04, 6) for on, _, _ in notes)
        assert of.onset[0, frame] == begun
    assert (of.instrument == 0).all()
    silent = labels.of(torch.tensor([0]), torch.tensor([0.0]), 10, 0.04)
    assert not (silent.melody.any() or silent.bass.any() or silent.onset.any())


def test_past_the_end_nothing_is_played():
    labels = note_labels([clip([[0.0, 2.0, 60]])], ["flute"])
    of = labels.of(torch.tensor([0]), torch.tensor([1.6]), 20, 0.04)
    assert of.melody[0].tolist() == [40] * 10 + [0] * 10
    assert not of.onset.any()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"instrument": "flute"}, "has the instrument 'flute' and no notes"),
        ({"instrument": "kazoo", "notes": []}, "has the instrument 'kazoo' .*one of flute"),
        ({"notes": []}, "has the instrument None"),
        ({"instrument": "flute", "notes": [[0, 1, 20]]}, "has the pitch 20"),
    ],
)
def test_facts_that_say_too_little_are_refused(facts, message):
    with pytest.raises(ManifestError, match=message):
        note_labels([Clip("x.wav", 1.0, ("x",), "train", "x", facts)], ["flute"])


@pytest.fixture(scope="module")
def manifest(tones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    clips = []
    for n in range(6):
        audio = torch.cat([tones(0.4, 220 * 2 ** ((n + step) / 12)) for step in range(2)])
        save_audio(folder / f"{n}.wav", audio, 16000)
        notes = [[0.4 * step, 0.4, 57 + n + step] for step in range(2)]
        facts = {"instrument": ("flute", "organ")[n % 2], "notes": notes}
        split = "train" if n < 4 else "validation"
        clips.append(Clip(folder / f"{n}.wav", 0.8, ("x",), split, f"piece {n}", facts))
    return write_manifest(folder / "manifest.jsonl", clips)


def place(manifest, tmp_path, **encoder):
    return Workplace(tmp_path, manifest, {"semantic_encoder": LOOP | encoder}, CPU)


@pytest.mark.parametrize(("kind", "cls"), [("notes", NoteTokenizer), ("best-rq", BestRQTokenizer)])
def test_the_recipe_trains(manifest, tmp_path, kind, cls):
    torch.manual_seed(0)
    recipe = semantic_encoder_recipe(place(manifest, tmp_path, kind=kind, model=MODELS[kind]))
    assert isinstance(recipe.model, cls)
    assert recipe.model.front_end.mean.any()
    optimizer = torch.optim.AdamW(recipe.model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        losses.append(recipe.losses(0)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    figures = recipe.validation()
    assert figures.keys() == recipe.losses(0).keys()
    assert all(math.isfinite(figure) for figure in figures.values())


def test_labels_are_those_of_the_crop(manifest, tmp_path):
    """A sine's own pitch comes back from the label at the loudest semitone band."""
    recipe_place = place(manifest, tmp_path, kind="notes", model=MODELS["notes"])
    model = semantic_encoder_recipe(recipe_place).model
    seen = []
    model.loss = lambda audio, labels: seen.append((audio, labels)) or {}
    recipe = semantic_encoder_recipe(recipe_place)
    recipe.model.loss = model.loss
    recipe.losses(3)
    audio, labels = seen[-1]
    assert labels.melody.shape == (3, 10)
    loudest = 33 + model.front_end.semitones(audio).argmax(-1)
    agree = loudest == labels.melody + 20
    assert agree.float().mean() > 0.8  # but where a window holds two notes or the crop's edge


def test_notes_are_learned_at_many_levels(manifest, tmp_path):
    """And validated at the clips' own."""
    recipe = semantic_encoder_recipe(
        place(manifest, tmp_path, kind="notes", model=MODELS["notes"], batch_size=64)
    )
    peaks = []
    recipe.model.loss = lambda audio, labels: peaks.append(audio.abs().amax(1)) or {}
    torch.manual_seed(0)
    recipe.losses(0)
    assert peaks[0].min() < 0.15 and peaks[0].max() > 0.6
    recipe.validation()
    assert peaks[1].min() > 0.75


def test_an_unknown_kind_is_refused(manifest, tmp_path):
    with pytest.raises(ConfigError, match="kind = 'wav2vec', wanted one of"):
        semantic_encoder_recipe(place(manifest, tmp_path, kind="wav2vec"))


def test_without_an_encoder_the_tokenizer_is_one_of_spectra(manifest, tmp_path):
    config = {"tokenizer": {"clips": 1, "model": {"num_tokens": 4, "num_components": 4}}}
    tokenizer = unfitted_tokenizer(Workplace(tmp_path, manifest, config, CPU))
    assert type(tokenizer) is SemanticTokenizer and tokenizer.num_tokens == 4
