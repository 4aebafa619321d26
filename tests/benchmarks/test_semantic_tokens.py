"""The figures by which semantic tokens are chosen, against other formulas."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import semantic_tokens
from benchmarks import token_information as information
from musiclm_engine.audio import save_audio
from musiclm_engine.audiolm.semantic_tokenizer import SemanticTokenizer
from musiclm_engine.checkpoint import save_model
from musiclm_engine.data.manifest import Clip, write_manifest


def rows(seed, *shape):
    return np.random.default_rng(seed).integers(0, 5, shape)


def test_mutual_information_is_the_divergence_of_the_joint_from_the_product():
    x = rows(0, 400)
    y = (x + (rows(1, 400) > 2)) % 3
    pairs, of_x, of_y = Counter(zip(x, y, strict=True)), Counter(x), Counter(y)
    expected = sum(n / 400 * math.log(n * 400 / (of_x[a] * of_y[b])) for (a, b), n in pairs.items())
    told = information.mutual_information(x, y)
    assert told == pytest.approx(expected)
    mean = (information.entropy(x) + information.entropy(y)) / 2
    assert information.normalised(told, x, y) == pytest.approx(expected / mean)


def test_nmi_of_the_same_labels_renamed_is_one_and_of_a_constant_zero():
    x = rows(0, 300)
    renamed = (x * 3 + 1) % 5
    told = information.mutual_information(x, renamed)
    assert information.normalised(told, x, renamed) == pytest.approx(1)
    constant = np.zeros_like(x)
    assert information.normalised(0.0, constant, constant) == 0
    assert information.mutual_information(x, constant) == pytest.approx(0)


def test_the_shuffled_floor_is_the_bias_of_counting():
    """Miller's (cells - tokens - labels + 1) / 2N, which holds for independent labels."""
    x, y = rows(0, 20000), rows(1, 20000)
    floor = np.mean([information.shuffled_floor(x, y, seed=s) for s in range(20)])
    assert floor == pytest.approx((25 - 5 - 5 + 1) / 40000, rel=0.3)


def test_repeats():
    assert information.repeat_rate(np.array([[1, 1, 2, 2], [3, 3, 3, 3]])) == pytest.approx(5 / 6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_against_a_dictionary(order):
    """Witten-Bell written the slow way: recursively, one token at a time."""
    fitted, held_out = rows(2, 6, 15), rows(3, 2, 9)
    follow = {}
    for clip in fitted.tolist():
        for length in range(order):
            for t in range(length, 15):
                key = tuple(clip[t - length : t])
                follow.setdefault(key, Counter())[clip[t]] += 1

    def probability(context, token):
        shorter = probability(context[1:], token) if context else 1 / 7
        seen = follow.get(context)
        if not seen:
            return shorter
        return (seen[token] + len(seen) * shorter) / (seen.total() + len(seen))

    nats = [
        -math.log(probability(tuple(clip[t - order + 1 : t]), clip[t]))
        for clip in held_out.tolist()
        for t in range(order - 1, 9)
    ]
    assert information.ngram_nats(fitted, held_out, 7, order) == pytest.approx(np.mean(nats))


def test_ngram_probabilities_sum_to_one():
    fitted = rows(2, 6, 15)
    start = rows(4, 1, 2)
    total = 0.0
    for token in range(7):
        clip = np.concatenate([start, [[token]]], axis=1)
        total += math.exp(-information.ngram_nats(fitted, clip, 7, 3))
    assert total == pytest.approx(1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Twelve clips of 1.2 s: tunes of three notes, and 'chorales' of two voices."""
    folder = tmp_path_factory.mktemp("tokens")
    random, clips = np.random.default_rng(0), []
    for n in range(12):
        chorale = n % 2
        pitches = random.integers(57, 81, 3)
        notes = [[0.4 * k, 0.4, int(p)] for k, p in enumerate(pitches)]
        notes += [[0.0, 1.2, 45]] * chorale
        time = np.arange(19200) / 16000
        audio = np.zeros(19200, np.float32)
        for onset, seconds, pitch in notes:
            sounds = (onset <= time) & (time < onset + seconds)
            hz = 440 * 2 ** ((pitch - 69) / 12)
            audio += 0.2 * sounds * np.sin(2 * np.pi * hz * time).astype(np.float32)
        save_audio(folder / f"{n}.wav", torch.from_numpy(audio), 16000)
        facts = {
            "instrument": "sine" if n % 3 else "tone",
            "kind": "chorale" if chorale else "jig",
            "notes": notes,
        }
        split = "train" if n < 8 else "test"
        clips.append(Clip(folder / f"{n}.wav", 1.2, ("x",), split, f"piece {n}", facts))
    return write_manifest(folder / "manifest.jsonl", clips)


def test_the_command_measures_every_tokenizer(manifest, tmp_path, capsys):
    out = tmp_path / "figures.json"
    trained = SemanticTokenizer(num_tokens=5, num_components=4)
    trained.fit(torch.randn(60, 118, generator=torch.Generator().manual_seed(0)), seed=0)
    save_model(trained, tmp_path / "model")
    semantic_tokens.main(
        ["--manifest", str(manifest), "--fit-clips", "8", "--test-clips", "4"]
        + ["--num-tokens", "48", "--json", str(out), "--trained", f"mine={tmp_path / 'model'}"]
    )
    figures = json.loads(out.read_text())
    assert figures["fit_clips"] == 8 and figures["frames_a_clip"] == 30
    measured = figures["tokenizers"]
    assert len(measured) == 5
    assert measured.pop("mine")["all"]["entropy"] <= math.log(5)  # it is not fitted again
    for row in measured.values():
        melody = row["tunes"]["melody"]
        assert melody["explained"] > melody["explained_shuffled"]
        assert row["all"]["unigram_nats"] > 0
    assert "| k-means of both |" in capsys.readouterr().out


def test_pitch_class_sets():
    clip = Clip("x", 1.0, ("x",), "test", "x", {"notes": [[0.0, 0.4, 60], [0.2, 0.2, 67]]})
    sets = semantic_tokens.pitch_class_sets(clip, 12)
    assert sets.tolist() == [1] * 5 + [1 | 1 << 7] * 5 + [0] * 2
