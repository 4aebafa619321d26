"""The permutation tests against all arrangements there are, counted out."""

from itertools import permutations, product

import numpy as np
import pytest

from musiclm_engine.evaluation.permutation import p_value, redrawn_means, shuffled_means


def test_p_value_counts_ties_and_itself() -> None:
    assert p_value(0.5, np.array([0.4, 0.5, 0.6])) == 0.75
    assert p_value(0.7, np.array([0.4, 0.5, 0.6])) == 0.25


def test_dealings_are_the_permutations_each_as_often() -> None:
    scores = np.random.default_rng(0).random((4, 4))
    scores[:, 2] = np.nan  # a caption that is not judged takes a clip nevertheless
    exact = [
        np.nanmean([scores[clip, caption] for caption, clip in enumerate(order)])
        for order in permutations(range(4))
    ]
    drawn = shuffled_means(scores, seed=1, rounds=6000)
    values, counts = np.unique(drawn.round(9), return_counts=True)
    wanted, multiplicity = np.unique(np.round(exact, 9), return_counts=True)
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_allclose(counts / 6000, multiplicity / 24, atol=0.015)


def test_draws_are_all_choices_each_as_often() -> None:
    scores = np.random.default_rng(2).integers(2, size=(3, 4)).astype(float)
    exact = [np.mean(choice) for choice in product(*scores)]
    drawn = redrawn_means(scores, seed=3, rounds=6000)
    assert len(drawn) == 6000
    for value in np.unique(exact):
        share = np.mean(np.abs(drawn - value) < 1e-9)
        assert share == pytest.approx(np.mean(np.abs(exact - value) < 1e-9), abs=0.02)


def test_choices_that_look_at_nothing_have_uniform_p_values() -> None:
    """Where most candidates fail, leads are far from symmetric: the case that flips get wrong."""
    rng = np.random.default_rng(4)
    p_values = []
    for trial in range(200):
        scores = (rng.random((60, 4)) < 0.1).astype(float)
        by_chance = redrawn_means(scores, seed=trial, rounds=199)
        p_values.append(p_value(scores[:, 0].mean(), by_chance))
    for level in (0.1, 0.25, 0.5):  # never more false alarms than promised, but for the draw of 200
        allowed = level + 3 * np.sqrt(level * (1 - level) / 200)
        assert np.mean(np.array(p_values) <= level) <= allowed
