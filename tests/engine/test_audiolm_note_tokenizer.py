"""A network that reads notes, and the clusters of what it reads."""

import pytest
import torch

from musiclm_engine.audiolm.bands import FrontEnd
from musiclm_engine.audiolm.note_tokenizer import Notes, NoteTokenizer
from musiclm_engine.checkpoint import load_model, save_model

SMALL = {
    "instruments": ["sine", "reed"],
    "num_tokens": 32,
    "num_components": 12,
    "dim": 16,
    "depth": 1,
}
PITCHES = (57, 61, 64, 69)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NoteTokenizer(**SMALL)


@pytest.fixture(scope="module")
def played(tones):
    """Four notes on two instruments, half a second each, and their labels."""
    audio, melody = [], []
    for overtones in ((1,), (1, 2, 3, 4)):
        hz = [440 * 2 ** ((pitch - 69) / 12) for pitch in PITCHES]
        audio.append(torch.cat([tones(0.48, *(n * f for n in overtones)) for f in hz]))
        melody.append(torch.tensor(PITCHES).repeat_interleave(12) - 20)
    melody = torch.stack(melody)
    onset = torch.zeros_like(melody)
    onset[:, ::12] = 1
    instrument = torch.tensor([[0], [1]]).expand(-1, 48)
    return torch.stack(audio), Notes(melody, melody, onset, instrument)


@pytest.fixture(scope="module")
def trained(played):
    torch.manual_seed(0)
    model, (audio, labels) = NoteTokenizer(**SMALL), played
    model.standardise(audio)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(audio, labels)["loss"].backward()
        optimizer.step()
    model.eval().fit(model.features(audio).flatten(0, 1), seed=0)
    return model


@pytest.mark.parametrize("samples", [1, 640, 641, 8000])
def test_a_frame_a_hop(model, samples):
    notes = model(0.1 * torch.ones(2, samples))
    frames = -(-samples // 640)
    assert notes.melody.shape == notes.bass.shape == (2, frames, 89)
    assert notes.onset.shape == (2, frames, 2) and notes.instrument.shape == (2, frames, 2)


def test_a_short_training_reads_the_notes(trained, played):
    audio, labels = played
    with torch.no_grad():
        losses, read = trained.loss(audio, labels), trained(audio)
    assert losses["loss"] < 1.0
    assert (read.melody.argmax(-1) == labels.melody).float().mean() > 0.9
    assert (read.instrument.argmax(-1) == labels.instrument).all()


def test_the_loss_is_the_sum_of_cross_entropies(model, played):
    audio, labels = played
    losses, logits = model.loss(audio, labels), model(audio)
    expected = 0.0
    for name in ("melody", "bass", "onset", "instrument"):
        log_p = getattr(logits, name).double().log_softmax(-1)
        mean = -log_p.gather(-1, getattr(labels, name)[..., None]).mean()
        torch.testing.assert_close(losses[name].double(), mean, rtol=1e-5, atol=0)
        expected = expected + mean
    torch.testing.assert_close(losses["loss"].double(), expected, rtol=1e-5, atol=0)


def test_tokens_tell_notes_and_instruments_apart(trained, played):
    tokens = trained.encode(played[0])
    # The middles of the eight notes, away from what begins and ends.
    assert len({int(token) for token in tokens[:, 6::12].flatten()}) == 8


def test_features_are_weighted_roots_of_distributions(model, played):
    audio = played[0]
    model.weights = {"onset": 0.5, "instrument": 2.0}
    squares = model.features(audio).square().split([89, 89, 2, 2], dim=-1)
    for part, weight in zip(squares, (1, 1, 0.25, 4), strict=True):
        torch.testing.assert_close(part.sum(-1), torch.full((2, 48), float(weight)))


def test_a_frame_sees_so_far_and_no_farther(model, played):
    """depth hops, and half of the longest window, which is 4,096 samples."""
    audio = played[0][:1]
    changed = audio.clone()
    changed[:, 24 * 640 :] = 0
    difference = (model.features(audio) - model.features(changed)).abs().amax(-1)[0]
    reach = 1 + 1 + 4096 // 2 // 640
    assert (difference[: 24 - reach] == 0).all() and difference[23] > 0


def test_saved_and_loaded_it_is_the_same(trained, played, tmp_path):
    save_model(trained, tmp_path / "model")
    again = load_model(tmp_path / "model", {"NoteTokenizer": NoteTokenizer})
    assert torch.equal(again.encode(played[0]), trained.encode(played[0]))
    assert again.config["instruments"] == ["sine", "reed"]
    assert torch.equal(trained.encode(played[0][1:]), trained.encode(played[0])[1:])


def test_tokens_survive_half_precision_and_a_second_saving(trained, played, tmp_path):
    """As in a set of models: rounded once, fitted, then tokenized with, and bundled at last."""
    stems = [tmp_path / name for name in ("encoder", "tokenizer", "bundled")]
    classes = {"NoteTokenizer": NoteTokenizer}
    save_model(trained, stems[0], dtype=torch.float16)
    fitted = load_model(stems[0], classes)
    fitted.fit(fitted.features(played[0]).flatten(0, 1), seed=0)
    model = fitted
    for stem in stems[1:]:
        save_model(model, stem, dtype=torch.float16)
        model = load_model(stem, classes)
        assert torch.equal(model.features(played[0]), fitted.features(played[0]))
        assert torch.equal(model.encode(played[0]), fitted.encode(played[0]))


def test_tokens_are_the_same_under_autocast(trained, played):
    with torch.autocast("cpu", torch.bfloat16):
        narrow = trained.encode(0.3 * played[0])
    assert torch.equal(narrow, trained.encode(0.3 * played[0]))


def test_more_components_than_features_are_refused_before_training():
    with pytest.raises(ValueError, match="num_components is 200, wanted 1 to 182"):
        NoteTokenizer(**SMALL | {"num_components": 200})


def test_not_fitted_is_refused(model):
    with pytest.raises(RuntimeError, match="not fitted"):
        model.encode(torch.zeros(1, 640))


@pytest.mark.parametrize("shape", [(640,), (1, 0), (1, 1, 640)])
def test_audio_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"wanted \[batch, samples >= 1\]"):
        model(torch.zeros(shape))


def test_labels_that_do_not_fit_are_refused(model, played):
    audio, labels = played
    short = Notes(labels.melody[:, 1:], labels.bass, labels.onset, labels.instrument)
    with pytest.raises(ValueError, match=r"labels of melody are torch.int64 \(2, 47\)"):
        model.loss(audio, short)
    wrong = Notes(labels.melody, labels.bass.int(), labels.onset, labels.instrument)
    with pytest.raises(
        ValueError, match=r"labels of bass are torch.int32 .*wanted int64 \(2, 48\)"
    ):
        model.loss(audio, wrong)


def test_the_front_end_is_standardised(played):
    front_end = FrontEnd(sample_rate_hz=16000, hop_length=640)
    front_end.standardise(played[0])
    bands = front_end(played[0]).double().flatten(0, 1)
    torch.testing.assert_close(bands.mean(0), torch.zeros(334).double(), rtol=0, atol=1e-3)
    assert ((bands.std(0, correction=0) - 1).abs() < 1e-2).all()


def test_the_long_window_tells_bass_notes_apart(tones):
    """A semitone at 110 Hz is 6.5 Hz: the highest third lies where the note is."""
    front_end = FrontEnd(sample_rate_hz=16000, hop_length=640)
    for number in range(-24, -11):
        audio = tones(0.64, 440 * 2 ** (number / 12))[None]
        thirds = front_end.thirds(audio)[0, 8]
        assert abs(thirds.argmax().item() / 3 + 33 - (69 + number)) <= 0.34
