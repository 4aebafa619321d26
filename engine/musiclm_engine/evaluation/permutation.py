"""Permutation tests: what a mean would be if nothing but chance had arranged what it is taken over."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

ROUNDS_PER_CHUNK = 256  # bounds the memory at 256 x clips indices


def p_value(value: float, by_chance: np.ndarray) -> float:
    """(1 + #{by_chance >= value}) / (1 + #by_chance), one-sided: never zero, at any number."""
    # The tolerance makes equal means, summed in another order, count as ties.
    return float((1 + np.count_nonzero(by_chance >= value - 1e-9)) / (1 + len(by_chance)))


def shuffled_means(scores: np.ndarray, *, seed: int, rounds: int) -> np.ndarray:
    """Means [rounds] of scores [clips, captions], a square, with the captions dealt at random to
    the clips; captions (columns) of NaN are left out of the mean."""
    judged = np.flatnonzero(~np.isnan(scores[0]))

    def deal(generator: np.random.Generator, count: int) -> np.ndarray:
        order = np.tile(np.arange(len(scores)), (count, 1))
        clip_of_caption = generator.permuted(order, axis=1)
        return scores[clip_of_caption[:, judged], judged].mean(1)

    return _in_chunks(deal, seed=seed, rounds=rounds)


def redrawn_means(scores: np.ndarray, *, seed: int, rounds: int) -> np.ndarray:
    """Means [rounds] of scores [prompts, candidates], one candidate of each prompt drawn at random.

    This is how the mean of the chosen candidates is distributed where the choice does not look at
    the scores, whatever these are. (To flip the signs of each choice's lead over its prompt's mean
    would ask that the lead be as often so far above as below, and one of four candidates that agrees
    alone leads by 3/4 or trails by 1/4.)
    """
    rows = np.arange(len(scores))

    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        chosen = generator.integers(scores.shape[1], size=(count, len(scores)))
        return scores[rows, chosen].mean(1)

    return _in_chunks(draw, seed=seed, rounds=rounds)


def _in_chunks(
    means: Callable[[np.random.Generator, int], np.ndarray], *, seed: int, rounds: int
) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [
            means(generator, min(ROUNDS_PER_CHUNK, rounds - first))
            for first in range(0, rounds, ROUNDS_PER_CHUNK)
        ]
    )
