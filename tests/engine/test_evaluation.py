"""The evaluation's statistics, from judgements made up here: no judge's package is needed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from musiclm_engine.evaluation import Judgement, compare_judgements
from musiclm_engine.evaluation.agreement import MEASURES, agreement, caption_key, stated_facts
from musiclm_engine.evaluation.instruments import INSTRUMENT_TAGS
from musiclm_engine.evaluation.judges import is_audibly_notes
from musiclm_engine.evaluation.notes import NoteActivity
from musiclm_engine.evaluation.report import attributes_table
from musiclm_engine.evaluation.tempo import tempo_agrees

INSTRUMENTS = list(INSTRUMENT_TAGS)
NAMES = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"]
PLAYING = NoteActivity(num_notes=30, notes_per_second=3.0, sounding_share=0.9)
EMBEDDING = np.zeros((3, 200))


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
    return Judgement(
        log_odds, caption_key(source), float(str(source["tempo_bpm"])), PLAYING, EMBEDDING
    )


def compare(candidates, truth, facts, **settings):
    return compare_judgements(candidates, truth, facts, **settings)["measures"]


def test_perfect_clips_reach_the_top_and_their_shuffle_falls_to_chance() -> None:
    rng = np.random.default_rng(0)
    facts = [random_facts(rng) for _ in range(80)]
    judgements = [heard(rng, f) for f in facts]
    measures = compare([[j] for j in judgements], judgements, facts, permutations=500)
    assert set(measures) == set(MEASURES)
    for name in ("instrument", "key_exact", "mode", "tempo_accuracy1", "combined"):
        row = measures[name]
        assert row["best"] == row["any"] == row["truth"] > 0.95, name
        assert row["p_followed"] == pytest.approx(1 / 501)
        assert row["share_of_truth"] == 1 and row["num_judged"] == 80
        assert row["p_best"] == 1  # there is but one candidate to choose
    assert measures["instrument"]["shuffled"] == pytest.approx(1 / 7, abs=0.04)
    assert measures["key_exact"]["shuffled"] == pytest.approx(1 / 24, abs=0.03)
    assert measures["mode"]["shuffled"] == pytest.approx(1 / 2, abs=0.03)
    assert measures["audibly_notes"]["best"] == 1 and measures["audibly_notes"]["shuffled"] is None


def test_p_values_of_following_are_uniform_where_clips_ignore_their_captions() -> None:
    rng = np.random.default_rng(1)
    p_values = []
    for trial in range(150):
        facts = [random_facts(rng) for _ in range(60)]
        judgements = [heard(rng, f, strength=0.0) for f in facts]
        measures = compare(
            [[j] for j in judgements], judgements, facts, seed=trial, permutations=199
        )
        p_values.append(measures["combined"]["p_followed"])
    # Means of many values have few ties: each third holds 50 of 150, and a binomial leaves 27 to 74
    # in 999 of 1,000; ties push p upwards, never down.
    counts, _ = np.histogram(p_values, bins=3, range=(0, 1))
    assert 27 <= counts.min() and counts.max() <= 74, counts
    assert min(p_values) >= 1 / 200


def test_a_planted_effect_is_found() -> None:
    rng = np.random.default_rng(2)
    facts = [random_facts(rng) for _ in range(60)]
    weak = [[heard(rng, f, strength=0.4)] for f in facts]
    perfect = [heard(rng, f) for f in facts]
    measures = compare(weak, perfect, facts, permutations=2000)
    for name in ("instrument", "key_exact", "tempo_accuracy1", "combined"):
        row = measures[name]
        assert row["p_followed"] < 0.005, name
        assert row["shuffled"] < row["best"] < row["truth"]
        assert row["share_of_truth"] == pytest.approx(row["best"] / row["truth"])


def test_what_chance_meets_does_not_count_above_chance() -> None:
    rng = np.random.default_rng(10)
    facts = [random_facts(rng) | {"mode": rng.choice(["major", "minor"])} for _ in range(400)]
    truth = [heard(rng, f, strength=0.6) for f in facts]
    for strength in (0.0, 0.3, 0.6):
        clips = [[heard(rng, f, strength)] for f in facts]
        for name, row in compare(clips, truth, facts, permutations=200).items():
            if name in ("instrument", "key_exact", "mode", "tempo_accuracy1", "combined"):
                assert row["above_chance"] == pytest.approx(strength / 0.6, abs=0.2), name
                wanted = (row["best"] - row["shuffled"]) / (row["truth"] - row["shuffled"])
                assert row["above_chance"] == pytest.approx(wanted, abs=0.1), name
        if not strength:  # "62 % of the true renderings" would be nothing to be proud of
            assert compare(clips, truth, facts, permutations=2)["mode"]["share_of_truth"] > 0.5
    deaf = compare([[j] for j in truth], [heard(rng, {**facts[0]})] * 400, facts, permutations=2)
    assert deaf["key_exact"]["above_chance"] is None  # where the ceiling is the floor
    assert deaf["audibly_notes"]["above_chance"] is None


def test_best_of_four_beats_any_only_where_the_choice_looks_at_the_music() -> None:
    rng = np.random.default_rng(3)
    facts = [random_facts(rng) for _ in range(80)]
    four = [[heard(rng, f, strength=0.4) for _ in range(4)] for f in facts]
    truth = [heard(rng, f) for f in facts]
    blind = compare(four, truth, facts, permutations=500)["combined"]
    assert 0.02 < blind["p_best"] < 0.98

    tables = agreement([clip for own in four for clip in own], facts)["combined"]
    own = [tables[4 * i : 4 * i + 4, i] for i in range(len(facts))]
    chosen = [
        [clips[n] for n in np.argsort(-scores)] for clips, scores in zip(four, own, strict=True)
    ]
    seeing = compare(chosen, truth, facts, permutations=500)["combined"]
    assert seeing["p_best"] == pytest.approx(1 / 501)
    assert seeing["any"] == pytest.approx(blind["any"]) == pytest.approx(np.mean(own))
    assert seeing["best"] == pytest.approx(np.mean([scores.max() for scores in own]))


def test_shuffled_mean_is_the_mean_over_all_dealings() -> None:
    rng = np.random.default_rng(4)
    facts = [random_facts(rng) for _ in range(20)]
    judgements = [heard(rng, f, strength=0.5) for f in facts]
    measures = compare([[j] for j in judgements], judgements, facts, permutations=5000)
    for name, table in agreement(judgements, facts).items():
        # A caption falls on each clip equally often, so the expected mean is the table's own.
        if name != "audibly_notes":
            assert measures[name]["shuffled"] == pytest.approx(table.mean(), abs=0.02), name
        assert measures[name]["best"] == pytest.approx(np.diag(table).mean())


def test_instruments_do_not_depend_on_a_tags_base_rate_or_swing() -> None:
    rng = np.random.default_rng(5)
    facts = [random_facts(rng) for _ in range(30)]
    judgements = [heard(rng, f, strength=0.5) for f in facts]
    moved = [
        replace(
            j,
            instrument_log_odds={
                name: (2.0 + n) * v - 20.0 * n
                for n, (name, v) in enumerate(j.instrument_log_odds.items())
            },
        )
        for j in judgements
    ]
    before, after = agreement(judgements, facts), agreement(moved, facts)
    np.testing.assert_array_equal(before["instrument"], after["instrument"])


def test_only_what_a_caption_states_is_judged() -> None:
    facts = {"instrument": "flute", "key": "G", "mode": "dorian", "tempo_bpm": 90, "metre": "3/4"}
    assert stated_facts(facts, {"instrument", "kind", "metre"}) == {"instrument": "flute"}
    assert stated_facts(facts, {"key"}) == {"key": "G", "mode": "dorian"}
    assert stated_facts(facts, {"mode", "tempo_word"}) == {"mode": "dorian"}
    assert stated_facts(facts, {"tempo_bpm"}) == {"tempo_bpm": 90}
    assert stated_facts({}, {"instrument", "key"}) == {}


def test_what_is_not_stated_has_no_column() -> None:
    rng = np.random.default_rng(6)
    judgements = [heard(rng, random_facts(rng)) for _ in range(6)]
    facts = [
        {},
        {"instrument": "church organ", "key": "G"},
        {"mode": "minor", "tempo_bpm": None},
        {"instrument": "nylon guitar"},
        {"key": "Bb", "mode": "dorian", "notes": [[0.0, 1.0, 60]]},
        {"instrument": "flute", "tempo_bpm": 90},
    ]
    measures = compare([[j] for j in judgements], judgements, facts, permutations=50)
    counts = {name: row["num_judged"] for name, row in measures.items()}
    assert counts == {
        "instrument": 2,
        "key_exact": 1,
        "key_exact_or_relative": 1,
        "mode": 2,
        "tempo_accuracy1": 1,
        "tempo_accuracy2": 1,
        "combined": 3,
        "audibly_notes": 6,
    }
    nothing = compare_judgements([[j] for j in judgements], judgements, [{}] * 6, permutations=50)
    row = nothing["measures"]["instrument"]
    assert row["num_judged"] == 0 and row["best"] is None and row["p_followed"] is None
    table = attributes_table(json.loads(json.dumps(nothing)), facts_are_stated=True)
    assert "| – | – | – | – | – | – | – | – | 0 |" in table


def test_combined_is_the_mean_over_what_is_stated() -> None:
    rng = np.random.default_rng(7)
    facts = [
        {"instrument": "flute"},
        {"instrument": "flute", "tempo_bpm": 90},
        {"instrument": "flute", "key": "C", "mode": "major", "tempo_bpm": 90},
        {"key": "C", "mode": "major"},
        {"mode": "major"},
    ]
    judgements = [heard(rng, random_facts(rng)) for _ in range(12)]
    tables = agreement(judgements, facts)
    instrument, key, tempo = (
        tables[name] for name in ("instrument", "key_exact_or_relative", "tempo_accuracy2")
    )
    combined = tables["combined"]
    np.testing.assert_allclose(combined[:, 0], instrument[:, 0])
    np.testing.assert_allclose(combined[:, 1], (instrument[:, 1] + tempo[:, 1]) / 2)
    np.testing.assert_allclose(combined[:, 2], (instrument + key + tempo)[:, 2] / 3)
    np.testing.assert_allclose(combined[:, 3], key[:, 3])
    assert np.isnan(combined[:, 4]).all()


def test_keys_and_modes() -> None:
    assert caption_key({"key": "Bb", "mode": "dorian"}) == (10, "minor")
    assert caption_key({"key": "F#", "mode": "mixolydian"}) == (6, "major")
    assert caption_key({"key": "Cb", "mode": "major"}) == (11, "major")
    assert caption_key({"key": "C"}) is None
    judgement = Judgement(dict.fromkeys(INSTRUMENTS, 0.0), (9, "minor"), None, PLAYING, EMBEDDING)
    facts = [
        {"key": "A", "mode": "minor"},
        {"key": "C", "mode": "major"},
        {"key": "A", "mode": "major"},
        {"key": "D", "mode": "dorian"},
    ]
    tables = agreement([judgement, replace(judgement, key=None)], facts)
    assert tables["key_exact"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert tables["key_exact_or_relative"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert tables["mode"].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


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


def test_a_judgement_comes_back_from_json_as_it_was() -> None:
    rng = np.random.default_rng(8)
    for key in ((3, "minor"), None):
        judgement = replace(
            heard(rng, random_facts(rng)),
            key=key,
            embedding=rng.normal(size=(3, 200)).astype(np.float32),
        )
        again = Judgement.from_json(json.loads(json.dumps(judgement.to_json())))
        np.testing.assert_array_equal(again.embedding, judgement.embedding)
        assert replace(again, embedding=EMBEDDING) == replace(judgement, embedding=EMBEDDING)


def test_figures_are_json_and_depend_on_the_seed_alone() -> None:
    rng = np.random.default_rng(9)
    facts = [random_facts(rng) for _ in range(12)]
    four = [[heard(rng, f, strength=0.5) for _ in range(4)] for f in facts]
    truth = [heard(rng, f) for f in facts]
    first = compare_judgements(four, truth, facts, seed=7, permutations=300)
    assert json.loads(json.dumps(first)) == first
    assert first == compare_judgements(four, truth, facts, seed=7, permutations=300)
    assert first["num_captions"] == 12 and first["num_candidates"] == 4
    table = attributes_table(first, facts_are_stated=False)
    assert table.count("\n|") == 1 + len(MEASURES)
    assert "best of 4" in table and "300 dealings" in table and "all facts of its clip" in table


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"instrument": "kazoo"}, "piano.*church organ; got 'kazoo'"),
        ({"key": "H", "mode": "major"}, "got 'H'"),
        ({"key": "C##", "mode": "major"}, "got 'C##'"),
        ({"key": "C", "mode": "blues"}, "dorian.*got 'blues'"),
        ({"mode": "blues"}, "dorian.*got 'blues'"),
        ({"tempo_bpm": -3}, "got -3"),
    ],
)
def test_what_cannot_be_compared_is_refused(facts, message) -> None:
    judgement = heard(np.random.default_rng(10), random_facts(np.random.default_rng(10)))
    with pytest.raises(ValueError, match=message):
        compare_judgements([[judgement]], [judgement], [facts])
    with pytest.raises(ValueError, match="1 captions have candidates, 0 a true rendering"):
        compare_judgements([[judgement]], [], [{}])
    with pytest.raises(ValueError, match="0 captions have candidates"):
        compare_judgements([], [], [])
    with pytest.raises(ValueError, match="differ in number"):
        compare_judgements([[judgement], []], [judgement] * 2, [{}] * 2)
    with pytest.raises(ValueError, match="permutations must be at least 1; got 0"):
        compare_judgements([[judgement]], [judgement], [{}], permutations=0)
