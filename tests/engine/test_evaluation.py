"""The evaluation's statistics, from judgements made up here: no judge's package is needed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from musiclm_engine.evaluation import (
    JudgedClip,
    Judgement,
    compare_judgements,
    evaluate_clips,
    is_audibly_notes,
    markdown_table,
)
from musiclm_engine.evaluation.evaluate import agreement, caption_key, permutation_p_value
from musiclm_engine.evaluation.instruments import INSTRUMENT_TAGS
from musiclm_engine.evaluation.notes import NoteActivity
from musiclm_engine.evaluation.tempo import tempo_agrees

INSTRUMENTS = list(INSTRUMENT_TAGS)
NAMES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
PLAYING = NoteActivity(num_notes=30, notes_per_second=3.0, sounding_share=0.9)


def random_facts(rng: np.random.Generator) -> dict[str, object]:
    return {
        "instrument": str(rng.choice(INSTRUMENTS)),
        "key": str(rng.choice(NAMES)),
        "mode": str(rng.choice(["major", "minor"])),
        "tempo_bpm": float(rng.integers(50, 160)),
    }


def heard(rng: np.random.Generator, facts: dict[str, object], strength: float = 1.0) -> Judgement:
    """A judgement that follows the facts with probability `strength`, and otherwise other facts."""
    source = facts if rng.random() < strength else random_facts(rng)
    log_odds = {name: float(rng.normal(-3)) for name in INSTRUMENTS}
    log_odds[str(source["instrument"])] += 6.0
    return Judgement(log_odds, caption_key(source), float(str(source["tempo_bpm"])), PLAYING)


def test_perfect_clips_reach_the_top_and_their_shuffle_falls_to_chance() -> None:
    rng = np.random.default_rng(0)
    facts = [random_facts(rng) for _ in range(80)]
    judgements = [heard(rng, f) for f in facts]
    result = compare_judgements(judgements, facts, judgements, facts, permutations=500)
    measures = result["measures"]
    for name in ("instrument_accuracy", "key_exact", "tempo_accuracy1"):
        assert measures[name]["generated"] == measures[name]["truth"] > 0.95, name
        assert measures[name]["p_value"] == pytest.approx(1 / 501)
    assert measures["instrument_accuracy"]["shuffled"] == pytest.approx(1 / 7, abs=0.04)
    assert measures["key_exact"]["shuffled"] == pytest.approx(1 / 24, abs=0.03)
    assert abs(measures["instrument_score"]["shuffled"]) < 0.02
    assert measures["instrument_score"]["generated"] > 1.5
    assert measures["audibly_notes"]["generated"] == 1.0


def test_p_values_are_uniform_where_clips_ignore_their_captions() -> None:
    rng = np.random.default_rng(1)
    p_values = []
    for trial in range(150):
        facts = [random_facts(rng) for _ in range(40)]
        judgements = [heard(rng, f, strength=0.0) for f in facts]
        result = compare_judgements(
            judgements, facts, judgements, facts, seed=trial, permutations=199
        )
        p_values.append(result["measures"]["instrument_score"]["p_value"])
    # Hardly any ties: each fifth holds 30 of 150, and a binomial leaves 12 to 51 in 3 of 100,000.
    counts, _ = np.histogram(p_values, bins=5, range=(0, 1))
    assert counts.min() >= 12 and counts.max() <= 51, counts
    assert min(p_values) >= 1 / 200


def test_a_planted_effect_is_found() -> None:
    rng = np.random.default_rng(2)
    facts = [random_facts(rng) for _ in range(60)]
    weak = [heard(rng, f, strength=0.4) for f in facts]
    perfect = [heard(rng, f) for f in facts]
    measures = compare_judgements(weak, facts, perfect, facts, permutations=2000)["measures"]
    for name in ("instrument_score", "instrument_accuracy", "key_exact", "tempo_accuracy1"):
        assert measures[name]["p_value"] < 0.005, name
        assert measures[name]["shuffled"] < measures[name]["generated"] < measures[name]["truth"]


def test_shuffled_mean_is_the_mean_over_all_dealings() -> None:
    rng = np.random.default_rng(3)
    facts = [random_facts(rng) for _ in range(20)]
    judgements = [heard(rng, f, strength=0.5) for f in facts]
    measures = compare_judgements(judgements, facts, judgements, facts, permutations=5000)[
        "measures"
    ]
    for name, table in agreement(judgements, facts).items():
        # A caption falls on each clip equally often, so the expected mean is the table's own.
        assert measures[name]["shuffled"] == pytest.approx(table.mean(), abs=0.02), name
        assert measures[name]["generated"] == pytest.approx(np.diag(table).mean())


def test_permutation_p_value_counts_ties_and_itself() -> None:
    assert permutation_p_value(0.5, np.array([0.4, 0.5, 0.6])) == 0.75
    assert permutation_p_value(0.7, np.array([0.4, 0.5, 0.6])) == 0.25


def test_instrument_scores_do_not_depend_on_a_tags_base_rate_or_swing() -> None:
    rng = np.random.default_rng(4)
    facts = [random_facts(rng) for _ in range(30)]
    judgements = [heard(rng, f, strength=0.5) for f in facts]
    moved = [
        replace(
            j, instrument_log_odds={n: 5.0 * v - 20.0 for n, v in j.instrument_log_odds.items()}
        )
        for j in judgements
    ]
    before, after = agreement(judgements, facts), agreement(moved, facts)
    np.testing.assert_allclose(before["instrument_score"], after["instrument_score"], atol=1e-12)
    np.testing.assert_array_equal(before["instrument_accuracy"], after["instrument_accuracy"])


def test_facts_that_are_missing_are_not_judged() -> None:
    rng = np.random.default_rng(5)
    full = [random_facts(rng) for _ in range(6)]
    judgements = [heard(rng, f) for f in full]
    facts = [
        {},
        {"instrument": "church organ", "key": "G"},
        {"mode": "minor", "tempo_bpm": None},
        {"instrument": "nylon guitar"},
        {"key": "Bb", "mode": "dorian", "notes": [[0.0, 1.0, 60]]},
        {"instrument": "flute", "tempo_bpm": 90},
    ]
    measures = compare_judgements(judgements, facts, judgements[:1], [{}], permutations=50)[
        "measures"
    ]
    assert measures["instrument_score"]["num_generated"] == 2
    assert measures["key_exact"]["num_generated"] == 1
    assert measures["tempo_accuracy2"]["num_generated"] == 1
    assert measures["audibly_notes"]["num_generated"] == 6
    assert measures["key_exact"]["num_truth"] == 0 and measures["key_exact"]["truth"] is None

    empty = compare_judgements(judgements[:1], [{}], judgements[:1], [{}], permutations=50)
    assert empty["measures"]["instrument_score"]["generated"] is None
    assert empty["measures"]["instrument_score"]["p_value"] is None
    assert "| – |" in markdown_table(json.loads(json.dumps(empty)))


def test_keys() -> None:
    assert caption_key({"key": "Bb", "mode": "dorian"}) == (10, "minor")
    assert caption_key({"key": "F#", "mode": "mixolydian"}) == (6, "major")
    assert caption_key({"key": "Cb", "mode": "major"}) == (11, "major")
    assert caption_key({"key": "C"}) is None
    judgement = Judgement(dict.fromkeys(INSTRUMENTS, 0.0), (9, "minor"), None, PLAYING)
    facts = [
        {"key": "A", "mode": "minor"},
        {"key": "C", "mode": "major"},
        {"key": "A", "mode": "major"},
    ]
    tables = agreement([judgement] * 3, facts)
    assert tables["key_exact"][0].tolist() == [1, 0, 0]
    assert tables["key_exact_or_relative"][0].tolist() == [1, 1, 0]


def test_tempo_tolerance_and_metrical_levels() -> None:
    assert tempo_agrees(124.7, 120) and tempo_agrees(115.3, 120)
    assert not tempo_agrees(125, 120) and not tempo_agrees(None, 120)
    for factor in (2, 3, 1 / 2, 1 / 3):
        assert not tempo_agrees(factor * 120, 120)
        assert tempo_agrees(factor * 120 * 1.03, 120, any_metrical_level=True)
    assert not tempo_agrees(180, 120, any_metrical_level=True)
    with pytest.raises(ValueError, match="positive; got 0"):
        tempo_agrees(100.0, 0)


def test_audibly_notes_needs_both_notes_and_sounding_time() -> None:
    assert is_audibly_notes(PLAYING)
    assert not is_audibly_notes(replace(PLAYING, notes_per_second=0.1))
    assert not is_audibly_notes(replace(PLAYING, sounding_share=0.1))


def test_evaluate_clips_judges_each_clip_once_and_gives_json() -> None:
    rng = np.random.default_rng(6)
    clips = [JudgedClip(np.full(4, i, np.float32), 16_000, random_facts(rng)) for i in range(12)]
    judged: list[int] = []
    done: list[tuple[int, int]] = []

    def judge(clip: JudgedClip) -> Judgement:
        judged.append(int(clip.audio[0]))
        return heard(np.random.default_rng(judged[-1]), dict(clip.facts))

    def run() -> dict[str, object]:
        return evaluate_clips(
            clips[:8],
            clips[8:],
            seed=7,
            permutations=100,
            judge=judge,
            progress=lambda *at: done.append(at),
        )

    result = run()
    assert judged == list(range(12))
    assert done == [(i + 1, 12) for i in range(12)]
    assert json.loads(json.dumps(result)) == result == run()
    assert result["num_generated"] == 8 and result["num_truth"] == 4
    table = markdown_table(result)
    assert table.count("\n|") == 8 and "8 (4)" in table


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"instrument": "kazoo"}, "piano.*church organ; got 'kazoo'"),
        ({"key": "H", "mode": "major"}, "got 'H'"),
        ({"key": "C##", "mode": "major"}, "got 'C##'"),
        ({"key": "C", "mode": "blues"}, "dorian.*got 'blues'"),
        ({"tempo_bpm": -3}, "got -3"),
    ],
)
def test_unknown_facts_are_refused_before_any_clip_is_judged(facts, message) -> None:
    def judge(clip: JudgedClip) -> Judgement:
        raise AssertionError("judged a clip")

    clip = JudgedClip(np.zeros(4, np.float32), 16_000, {})
    with pytest.raises(ValueError, match=message):
        evaluate_clips([clip], [replace(clip, facts=facts)], judge=judge)
    with pytest.raises(ValueError, match="truth holds no clips"):
        evaluate_clips([clip], [], judge=judge)
    with pytest.raises(ValueError, match="permutations must be at least 1; got 0"):
        evaluate_clips([clip], [clip], judge=judge, permutations=0)
