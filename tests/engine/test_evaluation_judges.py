"""The judges on sounds made here, whose notes and tempo are known."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from musiclm_engine.evaluation import packages
from musiclm_engine.evaluation.instruments import INSTRUMENT_TAGS, instrument_log_odds
from musiclm_engine.evaluation.notes import (
    NotePosteriors,
    NoteTranscriber,
    detect_notes,
    estimate_key,
    note_activity,
)
from musiclm_engine.evaluation.tagger import MTT_TAGS, MusicTagger, Tagging, load_musicnn
from musiclm_engine.evaluation.tempo import estimate_tempo
from musiclm_engine.evaluation.tensor_bundle import read_tensor_bundle

SAMPLE_RATE_HZ = 16_000
C_MAJOR_TUNE = (60, 64, 67, 72, 71, 67, 65, 69, 62, 64, 65, 67, 64, 60, 59, 62, 60, 67, 64, 60)


def needs(*names: str) -> None:
    """Skips where an optional package of the `eval` extra is missing: it is judged, not needed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: {packages.WEIGHTS_COMMAND}; {packages.LIBRARIES_COMMAND}")


def plucked(pitches: tuple[int, ...], note_seconds: float = 0.5) -> np.ndarray:
    """Decaying tones of eight harmonics, one after another."""
    time = np.arange(int(note_seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    notes = []
    for pitch in pitches:
        phase = 2 * np.pi * 440 * 2 ** ((pitch - 69) / 12) * time
        tone = sum(0.3 / h * np.sin(h * phase) for h in range(1, 9))
        notes.append(tone * np.exp(-3 * time))
    return np.concatenate(notes).astype(np.float32)


def transposed_to_minor(pitches: tuple[int, ...]) -> tuple[int, ...]:
    """C major to C harmonic minor: E and A flattened."""
    return tuple(p - 1 if p % 12 in (4, 9) else p for p in pitches)


@pytest.fixture(scope="module")
def transcriber() -> NoteTranscriber:
    needs("onnxruntime", "basic_pitch")
    return NoteTranscriber()


@pytest.mark.parametrize("tonic", [0, 3, 7, 10])
def test_key_of_a_played_tune(transcriber: NoteTranscriber, tonic: int) -> None:
    major = tuple(p + tonic for p in C_MAJOR_TUNE)
    minor = tuple(p + tonic for p in transposed_to_minor(C_MAJOR_TUNE))
    assert estimate_key(transcriber(plucked(major), SAMPLE_RATE_HZ).notes) == (tonic, "major")
    assert estimate_key(transcriber(plucked(minor), SAMPLE_RATE_HZ).notes) == (tonic, "minor")


def test_notes_of_a_tune_are_found_where_they_are_played(transcriber: NoteTranscriber) -> None:
    posteriors = transcriber(plucked(C_MAJOR_TUNE), SAMPLE_RATE_HZ)
    assert posteriors.notes.shape == posteriors.onsets.shape == (860, 88)
    found = detect_notes(posteriors)
    for index, pitch in enumerate(C_MAJOR_TUNE):
        starts = [start / 86 for start, _, p in found if p == pitch]
        assert min(abs(start - index / 2) for start in starts) < 0.08, (index, pitch)


def test_noise_and_silence_are_not_notes(transcriber: NoteTranscriber) -> None:
    noise = np.random.default_rng(0).standard_normal(10 * SAMPLE_RATE_HZ).astype(np.float32) * 0.1
    for audio in (noise, np.zeros_like(noise)):
        activity = note_activity(transcriber(audio, SAMPLE_RATE_HZ))
        assert activity.num_notes <= 3 and activity.sounding_share < 0.1
    playing = note_activity(transcriber(plucked(C_MAJOR_TUNE), SAMPLE_RATE_HZ))
    assert playing.num_notes >= 20 and playing.sounding_share > 0.9


def test_a_short_clip_at_another_rate_is_transcribed(transcriber: NoteTranscriber) -> None:
    time = np.arange(12_000) / 24_000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time).astype(np.float32)
    notes = transcriber(tone, 24_000).notes
    assert notes.shape == (43, 88) and notes[10:35].mean(0).argmax() == 69 - 21
    with pytest.raises(ValueError, match=r"got \(1, 12000\)"):
        transcriber(tone[None], 24_000)


def test_note_detection_on_made_up_posteriors() -> None:
    notes, onsets = np.zeros((100, 88)), np.zeros((100, 88))
    notes[10:40, 30] = 0.6  # one held note, struck again at 25
    onsets[10, 30] = onsets[25, 30] = 0.9
    onsets[32, 30] = 0.4  # too faint to count
    notes[50:60, 31] = 0.9  # 10 frames: too short
    notes[80:100, 32] = 0.31  # up to the end, without an onset
    posteriors = NotePosteriors(notes, onsets)
    assert detect_notes(posteriors) == [(10, 25, 51), (25, 40, 51), (80, 100, 53)]
    activity = note_activity(posteriors)
    assert activity.num_notes == 3 and activity.sounding_share == 0.5
    assert activity.notes_per_second == pytest.approx(3 * 86 / 100)
    assert estimate_key(np.zeros((10, 88))) is None
    assert estimate_key(np.full((10, 88), 0.1)) is None


@pytest.mark.parametrize("bpm", [100, 120, 140])
def test_tempo_of_clicks(bpm: int) -> None:
    needs("librosa")
    audio = np.zeros(10 * SAMPLE_RATE_HZ, np.float32)
    click = np.random.default_rng(0).standard_normal(160) * np.exp(-np.arange(160) / 30)
    for start in np.arange(0, 9.9, 60 / bpm):
        first = round(start * SAMPLE_RATE_HZ)
        audio[first : first + 160] += 0.5 * click
    tempo = estimate_tempo(audio, SAMPLE_RATE_HZ)
    assert tempo is not None and abs(tempo - bpm) < 0.03 * bpm
    assert estimate_tempo(np.zeros_like(audio), SAMPLE_RATE_HZ) is None


def test_checkpoint_reader_on_musicnn() -> None:
    needs("musicnn")
    tensors = read_tensor_bundle(f"{packages.wheel_folder('musicnn')}/MTT_musicnn/")
    trained = [
        name
        for name in tensors
        if "Adam" not in name and "moving" not in name and not name.endswith("_power")
    ]
    assert sum(tensors[name].size for name in trained) == 787_159
    assert tensors["conv2d/kernel"].shape == (7, 38, 1, 204)
    assert tensors["dense/kernel"].shape == (1506, 200)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert all((t > 0).all() for name, t in tensors.items() if name.endswith("moving_variance"))
    # The input is log10(10000 mel + 1): on music its mean lies between 0 and 4.
    assert 1 < float(tensors["batch_normalization/moving_mean"][0]) < 2


def test_checkpoint_reader_refuses_other_files(tmp_path) -> None:
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"")
    (tmp_path / "x.index").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="not a LevelDB table"):
        read_tensor_bundle(tmp_path / "x")


def test_checkpoint_reader_on_a_table_made_here(tmp_path) -> None:
    """Two tensors, keys with a shared prefix, from the formats' descriptions."""
    values = np.arange(6, dtype="<f4"), np.array([-7], dtype="<i8")
    # dtype 1 (float32), shape [2, 3], no offset (0), 24 bytes; then dtype 9 (int64), shape [1].
    first = bytes([8, 1, 0x12, 8, 0x12, 2, 8, 2, 0x12, 2, 8, 3, 0x28, 24])
    second = bytes([8, 9, 0x12, 4, 0x12, 2, 8, 1, 0x20, 24, 0x28, 8])
    entries = bytes([0, 0, 2, 8, 1]) + bytes([0, 3, len(first)]) + b"a/b" + first
    entries += bytes([2, 1, len(second)]) + b"c" + second
    block = entries + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
    handle = bytes([0, len(block)])
    index = bytes([0, 1, 2]) + b"z" + handle + (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
    footer = bytes([0, 0, len(block) + 5, len(index)]).ljust(40, b"\0")
    footer += (0xDB4775248B80FB57).to_bytes(8, "little")
    (tmp_path / "x.index").write_bytes(block + bytes(5) + index + bytes(5) + footer)
    (tmp_path / "x.data-00000-of-00001").write_bytes(values[0].tobytes() + values[1].tobytes())
    tensors = read_tensor_bundle(tmp_path / "x")
    assert list(tensors) == ["a/b", "a/c"]
    np.testing.assert_array_equal(tensors["a/b"], values[0].reshape(2, 3))
    np.testing.assert_array_equal(tensors["a/c"], values[1])


def test_tagger_hears_plucked_and_sung_tones_apart() -> None:
    needs("musicnn", "librosa")
    tagger = MusicTagger()
    tagging = tagger(plucked(C_MAJOR_TUNE), SAMPLE_RATE_HZ)
    assert tagging.probabilities.shape == (50,) and tagging.embedding.shape == (3, 200)
    sine = 0.3 * np.sin(2 * np.pi * 880 * np.arange(5 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ)
    flute_like = tagger(sine.astype(np.float32), SAMPLE_RATE_HZ)
    # A tone without overtones is the nearest thing to a flute that a formula gives.
    assert flute_like.log_odds("flute") > tagging.log_odds("flute") + 1
    assert MTT_TAGS[int(flute_like.probabilities.argmax())] == "flute"
    assert flute_like.log_odds("harpsichord") < flute_like.log_odds("flute")


def test_musicnn_computes_what_its_tensorflow_code_does() -> None:
    """`build_musicnn` of musicnn's models.py again, in NumPy and TensorFlow's layout."""
    needs("musicnn")
    tensors = read_tensor_bundle(f"{packages.wheel_folder('musicnn')}/MTT_musicnn/")

    def named(name: str, number: int) -> str:
        return f"{name}_{number}" if number else name

    def norm(x: np.ndarray, number: int) -> np.ndarray:
        prefix = named("batch_normalization", number)
        gamma, beta, mean, variance = (
            tensors[f"{prefix}/{key}"].astype(float)
            for key in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta

    def convolve(x: np.ndarray, number: int, before: int, after: int) -> np.ndarray:
        """x [time, frequency] to ReLU, then batch norm, of a valid convolution of padded time."""
        kernel = tensors[f"{named('conv2d', number)}/kernel"].astype(float)[:, :, 0]
        x = np.pad(x, ((before, after), (0, 0)))
        views = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2])
        y = np.tensordot(views, kernel, 2) + tensors[f"{named('conv2d', number)}/bias"]
        return norm(np.maximum(y, 0), number + 1)

    log_mel = np.random.default_rng(0).uniform(0, 3.5, (50, 96))
    x = norm(log_mel[..., None], 0)[..., 0]
    padding = [(3, 3), (3, 3), (63, 64), (31, 32), (15, 16)]
    front = np.concatenate([convolve(x, n, *p).max(1) for n, p in enumerate(padding)], 1)
    first = convolve(front, 5, 3, 3)[:, 0]
    second = convolve(first, 6, 3, 3)[:, 0] + first
    third = convolve(second, 7, 3, 3)[:, 0] + second
    features = np.concatenate([front, first, second, third], 1)
    pooled = norm(np.stack([features.max(0), features.mean(0)], 1).ravel(), 9)
    hidden = np.maximum(pooled @ tensors["dense/kernel"] + tensors["dense/bias"], 0)
    penultimate = norm(hidden, 10)
    logits = penultimate @ tensors["dense_1/kernel"] + tensors["dense_1/bias"]

    actual = load_musicnn()(torch.from_numpy(log_mel[None].astype(np.float32)))
    np.testing.assert_allclose(actual[0][0].numpy(), logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(actual[1][0].numpy(), penultimate, rtol=1e-3, atol=1e-3)


def test_musicnn_in_eval_mode_treats_each_patch_alone() -> None:
    needs("musicnn")
    network = load_musicnn()
    patches = torch.rand(3, 187, 96, generator=torch.Generator().manual_seed(0)) * 3
    together, _ = network(patches)
    alone, _ = network(patches[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_instruments_read_the_tags_they_name() -> None:
    assert set().union(*INSTRUMENT_TAGS.values()) <= set(MTT_TAGS) and len(set(MTT_TAGS)) == 50
    probabilities = np.full(50, 0.1)
    probabilities[MTT_TAGS.index("choir")] = 0.9
    log_odds = instrument_log_odds(Tagging(probabilities, np.zeros(200)))
    assert log_odds["choir"] == pytest.approx(0.0)  # the mean of +2.2 (choir) and -2.2 (choral)
    assert log_odds["flute"] == pytest.approx(np.log(0.1 / 0.9))
    with pytest.raises(ValueError, match="'organ' is not one"):
        Tagging(probabilities, np.zeros(200)).log_odds("organ")


def test_a_missing_package_is_named_with_its_install_command(monkeypatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps basic-pitch==0\.4\.0"):
        NoteTranscriber()
    with pytest.raises(ModuleNotFoundError, match="'librosa'.*pip install onnxruntime"):
        MusicTagger()


def test_tensorflow_and_the_weights_packages_are_never_imported(
    transcriber: NoteTranscriber,
) -> None:
    assert not {"tensorflow", "basic_pitch", "musicnn"} & set(sys.modules)
