"""Compares generated clips with the facts of their captions, between a floor and a ceiling.

The judges took no part in training. They err on real music too, so each measure is given beside what
it is on true renderings (the ceiling) and on the generated clips with their captions dealt out at
random (the floor), whose spread is also the permutation test of "the clips follow their captions".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from musiclm_engine.evaluation.agreement import MEASURES, agreement, check_facts
from musiclm_engine.evaluation.judges import Judgement
from musiclm_engine.evaluation.permutation import p_value, redrawn_means, shuffled_means


def compare_judgements(
    candidates: Sequence[Sequence[Judgement]],
    truth: Sequence[Judgement],
    facts: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    permutations: int = 10_000,
) -> dict[str, Any]:
    """The judges' table: each measure of `agreement` in its four arms.

    Args:
        candidates: of each caption equally many clips, the one that would be played first.
        truth: of each caption one rendering of which it is true.
        facts: what each caption says, as `agreement` takes it.
        seed: of the permutations; permutations: how many, for each test.

    Returns:
        what `json.dumps` takes: "num_captions", "num_candidates", "permutations", "seed" and, under
        "measures", for each of `MEASURES`
            truth           share of true renderings that agree with their caption
            best            share of first candidates that do
            any             share of all candidates, which is what one drawn at random can expect
            shuffled        mean of `best` over random dealings of the captions
            share_of_truth  best / truth; of a measure that chance often meets it is high for nothing
            above_chance    what `best` has above clips dealt out at random, over what `truth` has:
                            0 for clips that ignore their captions; None where `truth` has nothing
            p_followed      of the dealings that do as well as `best`
            p_best          of random draws of one candidate a caption that do as well as `best`
            num_judged      captions that say it; where there are none, all other entries are None
        Both p are one-sided. "audibly_notes" asks no caption: nothing is shuffled there.

    Raises:
        ValueError: lists of different lengths, or empty ones; a fact that the judges do not know.
    """
    if not len(candidates) == len(truth) == len(facts) > 0:
        raise ValueError(
            f"{len(candidates)} captions have candidates, {len(truth)} a true rendering, {len(facts)} "
            "facts; wanted one of each for every caption"
        )
    num_candidates = len(candidates[0])
    if num_candidates == 0 or any(len(own) != num_candidates for own in candidates):
        raise ValueError("candidates differ in number between captions, or there are none")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; got {permutations}")
    for caption in facts:
        check_facts(caption)
    true_scores = agreement(truth, facts)
    flat = agreement([clip for own in candidates for clip in own], facts)
    measures = {}
    for name in MEASURES:
        by_prompt = flat[name].reshape(len(facts), num_candidates, len(facts))
        own = np.diagonal(by_prompt, axis1=0, axis2=2).T  # [captions, candidates]
        judged = ~np.isnan(own[:, 0])
        measures[name] = _measure(
            true_scores[name],
            own[judged],
            by_prompt[:, 0],
            asks_caption=name != "audibly_notes",
            seed=seed,
            permutations=permutations,
        )
    return {
        "num_captions": len(facts),
        "num_candidates": num_candidates,
        "permutations": permutations,
        "seed": seed,
        "measures": measures,
    }


def _measure(
    truth_by_caption: np.ndarray,
    candidates: np.ndarray,
    best_by_caption: np.ndarray,
    *,
    asks_caption: bool,
    seed: int,
    permutations: int,
) -> dict[str, Any]:
    """One row of the table, from scores [clips, captions], [judged, candidates] and [clips, captions]."""
    names = (
        *("truth", "best", "any", "shuffled", "share_of_truth"),
        *("above_chance", "p_followed", "p_best"),
    )
    row: dict[str, Any] = {**dict.fromkeys(names), "num_judged": len(candidates)}
    if not len(candidates):
        return row
    best, ceiling = float(candidates[:, 0].mean()), float(np.nanmean(np.diag(truth_by_caption)))
    redrawn = redrawn_means(candidates, seed=seed, rounds=permutations)
    row |= {
        "truth": ceiling,
        "best": best,
        "any": float(candidates.mean()),
        "share_of_truth": best / ceiling if ceiling else None,
        "p_best": p_value(best, redrawn),
    }
    if asks_caption:
        shuffled = shuffled_means(best_by_caption, seed=seed, rounds=permutations)
        # Over all dealings a caption meets each clip equally often: the mean is the table's.
        lead = best - np.nanmean(best_by_caption)
        true_lead = ceiling - np.nanmean(truth_by_caption)
        row |= {
            "shuffled": float(shuffled.mean()),
            "above_chance": float(lead / true_lead) if true_lead > 1e-9 else None,
            "p_followed": p_value(best, shuffled),
        }
    return row
