"""Tempi as tokens, and time in beats."""

import pytest
import torch

from musiclm_engine import SemanticTransformer
from musiclm_engine.audiolm.beat_clock import (
    FASTEST_BPM,
    NUM_TEMPI,
    SLOWEST_BPM,
    TICKS_A_BEAT,
    BeatClock,
    bpm_of,
    tempo_tokens,
)


def test_a_tempo_is_rounded_by_less_than_a_hundredth():
    bpm = torch.linspace(SLOWEST_BPM, FASTEST_BPM, 500)
    tokens = tempo_tokens(bpm)
    assert tokens.min() == 0 and tokens.max() == NUM_TEMPI - 1
    assert ((bpm_of(tokens) / bpm).log().abs() < 0.01).all()


@pytest.mark.parametrize(("bpm", "octave"), [(20.0, 40.0), (9.5, 76.0), (300.0, 150.0)])
def test_tempi_outside_the_range_are_taken_octaves_nearer(bpm, octave):
    assert tempo_tokens(torch.tensor([bpm])) == tempo_tokens(torch.tensor([octave]))


def test_moments_are_ticks_of_beats():
    clock = BeatClock(frame_rate_hz=25.0, dim=4)
    tempo = tempo_tokens(torch.tensor([60.0, 120.0]))
    seconds = clock.moments(torch.tensor([0, 25, 75]), tempo)
    # A second holds one beat and two, but for the rounding of tempi.
    wanted = TICKS_A_BEAT * torch.tensor([[0, 1, 3], [0, 2, 6]])
    assert (seconds - wanted).abs().max() <= 0.01 * wanted.max()
    assert clock.moments(torch.arange(100), torch.tensor([0])).diff().min() >= 1  # none coincide
    assert clock.moments(torch.tensor([64]), torch.tensor([NUM_TEMPI - 1])) <= clock.span(64)


def test_twice_as_fast_is_half_as_far():
    """In beats the same music has the same codes at both tempi: every other frame of the slower."""
    stage = SemanticTransformer(
        num_semantic_tokens=4, conditioning_size=4, conditioning_length=1, dim=16, depth=1,
        heads=1, dim_head=16, max_frames=64, frame_rate_hz=25.0,
    )  # fmt: skip
    slow, fast = tempo_tokens(torch.tensor([70.0, 140.0]))
    _, slow_keys = stage.codes(0, 40, slow[None])
    _, fast_keys = stage.codes(0, 20, fast[None])
    first = stage.outside_time
    assert torch.equal(slow_keys[0, first::2], fast_keys[0, first:])


@pytest.mark.parametrize("rate", [0.0, -25.0, float("nan")])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match="frame_rate_hz is .*, wanted a number above 0"):
        BeatClock(rate, dim=4)
