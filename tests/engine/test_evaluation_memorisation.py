"""What counts as a repetition, and a semantic stage that is made to repeat."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

from musiclm_engine.evaluation import memorisation
from musiclm_engine.evaluation.memorisation import (
    Continued,
    entropy_bits,
    judge_memorisation,
    match_threshold,
    share_found_anywhere,
    transport_cost,
)

pytest.importorskip("scipy")


def line(positions: np.ndarray) -> np.ndarray:
    """Distances between clusters that lie on a line."""
    return np.abs(positions[:, None] - positions[None])


def test_transport_on_a_line_moves_in_order() -> None:
    """There the least cost is known: the k-th of one to the k-th of the other, both sorted."""
    rng = np.random.default_rng(0)
    positions = rng.normal(size=30)
    for _ in range(5):
        a, b = rng.integers(30, size=(2, 125))
        exact = np.abs(np.sort(positions[a]) - np.sort(positions[b])).mean()
        assert transport_cost(a, b, line(positions)) == pytest.approx(exact)


def test_transport_is_the_cheapest_of_all_assignments_and_blind_to_order() -> None:
    rng = np.random.default_rng(1)
    centroids = rng.normal(size=(9, 3))
    distances = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
    a, b = rng.integers(9, size=(2, 6))
    exact = min(distances[a, list(order)].mean() for order in permutations(b))
    assert transport_cost(a, b, distances) == pytest.approx(exact)
    assert transport_cost(rng.permutation(a), b, distances) == pytest.approx(exact)
    assert transport_cost(a, rng.permutation(a), distances) == 0


def test_at_most_one_negative_pair_in_ten_thousand_lies_below_the_threshold() -> None:
    rng = np.random.default_rng(2)
    positions = rng.normal(size=40)
    targets = rng.integers(40, size=(160, 8))
    pieces = [f"piece {n // 2}" for n in range(160)]
    targets[1] = targets[0]  # the same piece twice is no negative pair
    threshold = match_threshold(targets, pieces, line(positions))
    negative = [
        np.abs(np.sort(positions[targets[i]]) - np.sort(positions[targets[j]])).mean()
        for i in range(160)
        for j in range(i)
        if pieces[i] != pieces[j]
    ]
    assert len(negative) == 160 * 159 / 2 - 80 > 10_000
    assert sum(cost < threshold - 1e-12 for cost in negative) == 1
    assert sorted(negative)[1] == pytest.approx(threshold)
    with pytest.raises(ValueError, match="all training clips are of one piece"):
        match_threshold(targets, ["one"] * 160, line(positions))


def test_found_anywhere_means_whole_in_one_clip_at_any_offset() -> None:
    trained = np.arange(60).reshape(3, 20)
    generated = np.array(
        [[0, 1, 2], [17, 18, 19], [45, 46, 47], [19, 20, 21], [1, 0, 2], [1023, 1023, 1023]]
    )
    assert share_found_anywhere(generated, trained) == 0.5  # 19, 20, 21 lie in two clips
    assert share_found_anywhere([np.array([3, 4]), np.array([5, 6, 8])], trained) == 0.5
    assert (
        share_found_anywhere(np.array([[0x0112, 0x0334]]), np.array([[0x0101, 0x1203, 0x3400]]))
        == 0
    )


def test_entropy_in_bits() -> None:
    assert entropy_bits(np.array([5, 5, 5])) == 0
    assert entropy_bits(np.array([1, 2, 3, 4])) == 2
    assert entropy_bits(np.array([1, 1, 2, 3])) == 1.5


def clips_of(seed: int, count: int = 6) -> Continued:
    generator = torch.Generator().manual_seed(seed)
    return Continued(
        [f"piece {seed} {n}" for n in range(count)],
        torch.randint(8, (count, 2), generator=generator),
        torch.randint(12, (count, 10), generator=generator),
    )


@pytest.fixture
def short(monkeypatch) -> None:
    """Clips of ten tokens: none or four are given, six are continued."""
    monkeypatch.setattr(memorisation, "CONTINUED_SECONDS", 6 / 25)
    monkeypatch.setattr(memorisation, "PROMPT_SECONDS", (0.0, 4 / 25))
    monkeypatch.setattr(memorisation, "ROWS_PER_BATCH", 4)


def test_a_stage_that_knows_its_clips_by_heart_is_found_out(
    short, monkeypatch, tiny_musiclm
) -> None:
    trained, held_out = clips_of(0), clips_of(1)
    known = {tuple(row.tolist()): n for n, row in enumerate(trained.conditioning)}
    calls = []

    def recite(stage, *, conditioning, context, prefix, frames, seeds, sampling, tempo):
        """Clips it was trained on, and for others always the same token."""
        assert stage is tiny_musiclm.audiolm.semantic and context is tempo is None
        calls.append((sampling.temperature, sampling.top_k, len(seeds), prefix.shape[1]))
        rows = []
        for own, given in zip(conditioning, prefix, strict=True):
            n = known.get(tuple(own.tolist()))
            row = torch.full((10,), 3) if n is None else trained.semantic[n].clone()
            if n is not None:
                assert torch.equal(given[:, 0], row[: len(given)])
            row = row[:frames]
            if n == 0:
                row[len(given) :] = row[len(given) :].flip(0)  # the same tokens in another order
            rows.append(row)
        return torch.stack(rows)[:, :, None]

    monkeypatch.setattr(memorisation, "decode_stage", recite)
    figures = judge_memorisation(tiny_musiclm, trained, held_out, seed=0)
    assert [(row["prompt_seconds"], row["is_greedy"]) for row in figures["rows"]] == [
        (0.0, False),
        (0.0, True),
        (4 / 25, False),
        (4 / 25, True),
    ]
    for row in figures["rows"]:
        assert row["trained_exact"] == pytest.approx(5 / 6)
        assert row["trained_approximate"] == 1
        assert row["held_out_exact"] == 0 and row["held_out_bits"] == 0 < row["trained_bits"]
    settings = tiny_musiclm.sampling.semantic
    assert [call[2] for call in calls[:4]] == [4, 2, 4, 2]  # of each kind of clips in turn
    assert {call[:2] for call in calls} == {
        (settings.temperature, settings.top_k),
        (0.0, settings.top_k),
    }
    assert {call[3] for call in calls} == {0, 4}


def test_a_stage_of_random_weights_knows_nothing(short, tiny_musiclm) -> None:
    trained, held_out = clips_of(2), clips_of(3)
    figures = judge_memorisation(tiny_musiclm, trained, held_out, seed=0)
    assert figures == judge_memorisation(tiny_musiclm, trained, held_out, seed=0)
    assert figures["num_trained"] == figures["num_held_out"] == 6
    for row in figures["rows"]:
        assert row["trained_exact"] == row["held_out_exact"] == 0
        assert 0 <= row["trained_approximate"] <= 1 and row["threshold"] > 0
    # Greedy tokens come of no seed, sampled ones do.
    other = judge_memorisation(tiny_musiclm, trained, held_out, seed=1)
    assert [row for row in figures["rows"] if row["is_greedy"]] == [
        row for row in other["rows"] if row["is_greedy"]
    ]
    assert figures != other


def test_clips_are_continued_at_their_own_tempi(short, monkeypatch, tiny_musiclm) -> None:
    trained, held_out = clips_of(5), clips_of(6)
    trained = replace(trained, tempo=torch.arange(6))
    held_out = replace(held_out, tempo=torch.arange(50, 56))
    tempo_of = {
        tuple(row.tolist()): int(tempo)
        for clips in (trained, held_out)
        for row, tempo in zip(clips.semantic[:, :4], clips.tempo, strict=True)
    }

    def watch(stage, *, prefix, frames, tempo, **others):
        for row, own in zip(prefix[:, :, 0], tempo, strict=True):
            assert len(row) == 0 or tempo_of[tuple(row.tolist())] == own
        return torch.zeros(len(prefix), frames, 1, dtype=torch.int64)

    monkeypatch.setattr(memorisation, "decode_stage", watch)
    assert judge_memorisation(tiny_musiclm, trained, held_out, seed=0)["num_trained"] == 6


def test_clips_too_short_to_be_continued_are_refused(short, tiny_musiclm) -> None:
    clips = clips_of(4)
    cut = replace(clips, semantic=clips.semantic[:, :9])
    with pytest.raises(ValueError, match=r"clips last 0.36 s, wanted 0.4 s"):
        judge_memorisation(tiny_musiclm, clips, cut, seed=0)
