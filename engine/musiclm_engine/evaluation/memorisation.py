"""Whether the semantic stage repeats its training clips (MusicLM, arXiv 2301.11325, section 4).

The stage is given a clip's own conditioning, its tempo if the stage counts beats, and the beginning
of its tokens; what it adds is compared
with what comes next in the clip. An exact match is all tokens alike. An approximate one is a small
cost of moving one histogram of tokens onto the other, over the distances between their clusters. The
paper finds the cost by Sinkhorn's algorithm; both histograms here hold equally many tokens, so that
the least cost is that of an assignment, which is solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.evaluation.packages import import_library
from musiclm_engine.generation import derive_seeds
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.evaluation_mode import evaluation_mode
from musiclm_engine.musiclm import MusicLM

CONTINUED_SECONDS = 5.0
PROMPT_SECONDS = (0.0, 5.0)
FALSE_POSITIVES = 1e-4  # of negative pairs that may count as approximate matches: the paper's
ROWS_PER_BATCH = 32


@dataclass(frozen=True)
class Continued:
    """Clips to continue.

    Attributes:
        pieces: [n] what each is a part of.
        conditioning: [n, M] MuLan tokens of their audio.
        semantic: [n, S] tokens.
        tempo: [n] for a semantic stage that counts beats, or None.
    """

    pieces: Sequence[str]
    conditioning: Tensor
    semantic: Tensor
    tempo: Tensor | None = None


def judge_memorisation(
    model: MusicLM, trained: Continued, held_out: Continued, *, seed: int
) -> dict[str, Any]:
    """Continues clips and counts what is repeated.

    The threshold of approximate matches is the paper's: few enough of the negative pairs, each the
    true continuations of two clips of different pieces, fall below it. It is found anew for each
    length of prompt, for costs are in units of the tokenizer. A stage that learnt nothing by heart
    also comes near, because conditioning and prompt say much of what follows: held-out clips, which
    it cannot know, say how near.

    Args:
        model: whose semantic stage continues, at its own settings and greedily.
        trained: clips that it was trained on.
        held_out: clips that it was not.
        seed: of the sampling.

    Returns:
        what `json.dumps` takes: "num_trained", "num_held_out", "continued_seconds" and, under
        "rows", for each prompt and way of drawing: "prompt_seconds", "is_greedy", "threshold", and of
        both kinds of clips ("trained_…", "held_out_…") the shares "exact" and "approximate", and
        "bits", the mean entropy of what was generated: those of few different tokens match easily.

    Raises:
        ValueError: clips too short to be continued, or all of one piece.
    """
    rate_hz = model.tokenizer.sample_rate_hz / model.tokenizer.hop_length
    length = round(CONTINUED_SECONDS * rate_hz)
    distances = _distances(model.tokenizer.centroids)
    rows = []
    for prompt_seconds in PROMPT_SECONDS:
        start = round(prompt_seconds * rate_hz)
        for clips in (trained, held_out):
            if clips.semantic.shape[1] < start + length:
                raise ValueError(
                    f"clips last {clips.semantic.shape[1] / rate_hz:g} s, "
                    f"wanted {prompt_seconds + CONTINUED_SECONDS:g} s to continue them"
                )
        targets = trained.semantic[:, start : start + length].numpy()
        threshold = match_threshold(targets, trained.pieces, distances)
        for is_greedy in (False, True):
            row: dict[str, Any] = {
                "prompt_seconds": prompt_seconds,
                "is_greedy": is_greedy,
                "threshold": threshold,
            }
            for kind, clips in (("trained", trained), ("held_out", held_out)):
                true = clips.semantic[:, start : start + length].numpy()
                made = _continue(
                    model,
                    clips,
                    start=start,
                    length=length,
                    seed=seed,
                    is_greedy=is_greedy,
                ).numpy()
                costs = [transport_cost(a, b, distances) for a, b in zip(made, true, strict=True)]
                row[f"{kind}_exact"] = float((made == true).all(1).mean())
                row[f"{kind}_approximate"] = float(np.mean(np.array(costs) < threshold))
                row[f"{kind}_bits"] = float(
                    np.mean([entropy_bits(row_tokens) for row_tokens in made])
                )
            rows.append(row)
    return {
        "num_trained": len(trained.semantic),
        "num_held_out": len(held_out.semantic),
        "continued_seconds": CONTINUED_SECONDS,
        "rows": rows,
    }


def share_found_anywhere(generated: Sequence[np.ndarray], trained: np.ndarray) -> float:
    """Share of the rows of generated, [L] each, that stand whole in a row of trained [n, S]."""
    apart = chr(0x10FFFF)  # between clips; no token is that large
    haystack = apart.join("".join(map(chr, row)) for row in trained.tolist())
    return float(np.mean(["".join(map(chr, row)) in haystack for row in generated]))


def match_threshold(targets: np.ndarray, pieces: Sequence[str], distances: np.ndarray) -> float:
    """The largest cost below which no more than `FALSE_POSITIVES` of the negative pairs lie.

    Args:
        targets: [n, L] tokens of n clips; pieces: of what each is a part; two clips of different
            pieces are a negative pair. distances: [K, K] between clusters.
    """
    negative = sorted(
        transport_cost(targets[i], targets[j], distances)
        for i, j in combinations(range(len(targets)), 2)
        if pieces[i] != pieces[j]
    )
    if not negative:
        raise ValueError("all training clips are of one piece: nothing tells what a match is")
    return float(negative[int(FALSE_POSITIVES * len(negative))])


def transport_cost(a: np.ndarray, b: np.ndarray, distances: np.ndarray) -> float:
    """The least mean distance at which the tokens a [L] can be moved onto b [L], in any order."""
    optimize = import_library("scipy").optimize
    between = distances[np.ix_(a, b)]
    return float(between[optimize.linear_sum_assignment(between)].mean())


def entropy_bits(tokens: np.ndarray) -> float:
    """Of the histogram of tokens."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log2(share)).sum())


def _distances(centroids: Tensor) -> np.ndarray:
    """[K, K] float64, exactly 0 from each to itself."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(centroids.double(), centroids.double(), compute_mode=exact).cpu().numpy()


@torch.inference_mode()
def _continue(
    model: MusicLM,
    clips: Continued,
    *,
    start: int,
    length: int,
    seed: int,
    is_greedy: bool,
) -> Tensor:
    """`length` tokens [n, length] after the first `start` of each clip."""
    sampling = model.sampling.semantic
    if is_greedy:
        sampling = replace(sampling, temperature=0.0)
    device = next(model.parameters()).device
    seeds = derive_seeds(seed, "memorisation", count=len(clips.semantic))
    made = []
    with evaluation_mode(model):
        for first in range(0, len(seeds), ROWS_PER_BATCH):
            rows = slice(first, first + ROWS_PER_BATCH)
            tokens = decode_stage(
                model.audiolm.semantic,
                conditioning=clips.conditioning[rows].to(device),
                context=None,
                prefix=clips.semantic[rows, :start, None].to(device),
                frames=start + length,
                seeds=seeds[rows].to(device),
                sampling=sampling,
                tempo=None if clips.tempo is None else clips.tempo[rows].to(device),
            )
            made.append(tokens[:, start:, 0].cpu())
    return torch.cat(made)
