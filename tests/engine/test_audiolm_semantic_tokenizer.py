"""Semantic tokens: one a frame, of what note sounds on what."""

import itertools

import pytest
import torch

from musiclm_engine.audiolm import SemanticTokenizer

SMALL = {"num_tokens": 96, "num_components": 16}


def semitone(number):
    return 440 * 2 ** (number / 12)


def piece(tones):
    """Silence and 24 notes a semitone apart, half a second each: 12.5 s."""
    notes = [tones(0.5, semitone(n), 2 * semitone(n), 3 * semitone(n)) for n in range(-12, 12)]
    return torch.cat([torch.zeros(8000), *notes])[None]


@pytest.fixture(scope="module")
def tokenizer(tones):
    tokenizer = SemanticTokenizer(**SMALL)
    tokenizer.fit(tokenizer.features(piece(tones))[0], seed=0)
    return tokenizer


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 16000])
def test_a_token_a_hop(tokenizer, samples):
    tokens = tokenizer.encode(0.1 * torch.ones(3, samples))
    assert tokens.shape == (3, -(-samples // 640)) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < 96


def test_not_fitted_is_refused():
    with pytest.raises(RuntimeError, match="not fitted"):
        SemanticTokenizer(**SMALL).encode(torch.zeros(1, 640))


def test_a_fit_that_fails_leaves_it_not_fitted(tones):
    tokenizer = SemanticTokenizer(**SMALL)
    few = tokenizer.features(piece(tones))[0, :20]
    with pytest.raises(ValueError, match="points are 20, k-means of 96"):
        tokenizer.fit(few, seed=0)
    with pytest.raises(RuntimeError, match="not fitted"):
        tokenizer.encode(torch.zeros(1, 640))


def test_fewer_features_than_components_are_refused(tones):
    tokenizer = SemanticTokenizer(num_tokens=4, num_components=16)
    with pytest.raises(ValueError, match="features are 10, 16 components"):
        tokenizer.fit(tokenizer.features(piece(tones))[0, :10], seed=0)


@pytest.mark.parametrize("shape", [(640,), (1, 0), (1, 1, 640)])
def test_audio_of_another_shape_is_refused(tokenizer, shape):
    with pytest.raises(ValueError, match=r"wanted \[batch, samples >= 1\]"):
        tokenizer.encode(torch.zeros(shape))


def test_a_semitone_up_and_silence_are_other_tokens(tokenizer, tones):
    tokens = tokenizer.encode(piece(tones))[0]
    silence, *notes = (int(tokens[(4000 + 8000 * n) // 640]) for n in range(25))
    assert silence not in notes
    assert all(note != higher for note, higher in itertools.pairwise(notes))


def test_a_steady_tone_keeps_its_features(tokenizer, tones):
    """More clusters than sounds: a tone may have several tokens, but none far from another."""
    tone, higher = (
        tokenizer.features(tones(1.0, semitone(n), 2 * semitone(n), 3 * semitone(n))[None])[0, 2:-2]
        for n in (3, 4)
    )
    spread = (tone - tone.mean(0)).norm(dim=1).amax()
    assert spread < 0.1 * (tone.mean(0) - higher.mean(0)).norm()


def test_loudness_counts_less_than_pitch(tokenizer, tones):
    def features(number, loudness):
        note = tones(0.5, semitone(number), 2 * semitone(number), 3 * semitone(number))
        return tokenizer.features(loudness * note[None])[0, 6]

    louder = (features(0, 1.0) - features(0, 0.7)).norm()
    assert louder < 0.25 * (features(0, 1.0) - features(1, 1.0)).norm()


def test_frames_are_centred_on_their_token(tokenizer, tones):
    """A click moves the token of its own frame, seen from both sides alike."""
    audio = torch.zeros(1, 6400)
    audio[0, 5 * 640 + 320] = 1.0
    features = tokenizer.features(audio)[0]
    assert (features - features[0]).abs().sum(1).argmax() == 5
    torch.testing.assert_close(features[4], features[6], rtol=0, atol=0.05)


def test_fitting_and_encoding_repeat(tokenizer, tones):
    again = SemanticTokenizer(**SMALL)
    again.fit(again.features(piece(tones))[0], seed=0)
    assert all(
        torch.equal(again.state_dict()[name], value)
        for name, value in tokenizer.state_dict().items()
    )
    audio = piece(tones)
    assert torch.equal(again.encode(audio), tokenizer.encode(audio))
    assert torch.equal(tokenizer.encode(audio.repeat(2, 1))[1:], tokenizer.encode(audio))


def test_config_rebuilds_it(tokenizer, tones):
    again = SemanticTokenizer.from_config(tokenizer.config)
    again.load_state_dict(tokenizer.state_dict())
    assert torch.equal(again.encode(piece(tones)), tokenizer.encode(piece(tones)))
