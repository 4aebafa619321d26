"""Captions say only what is so, in many ways."""

import itertools
import random
import re
from typing import Any

import pytest

from musiclm_engine.data.captions import NUM_CAPTIONS, key_names, tempo_words, write_captions
from musiclm_engine.data.instruments import DYNAMICS, INSTRUMENTS

FACTS: dict[str, Any] = {
    "instrument": "flute",
    "kind": "jig",
    "tempo_bpm": 120,
    "metre": "6/8",
    "key": "Bb",
    "mode": "minor",
    "dynamics": "soft",
}
TEMPO_WORDS = {"very slow", "slow", "moderate", "walking", "medium-tempo", "fast", "lively"}
DYNAMIC_WORDS = {"soft": {"soft", "quiet", "gentle"}, "loud": {"loud", "strong"}, "medium": set()}
KINDS = ("reel", "jig", "hornpipe", "slip jig", "march", "waltz", "air", "folk tune")
KEY = re.compile(r"\b([A-G])(b|#| flat| sharp)? (major|minor|dorian|mixolydian)\b")
MODE = re.compile(r"\b(major|minor|dorian|mixolydian)\b")


def many_facts() -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for instrument, dynamics in itertools.product(INSTRUMENTS, DYNAMICS):
        for _ in range(12):
            key = rng.choice([("G", "major"), ("Bb", "minor"), ("F#", "dorian"), (None, None)])
            rows.append(
                {
                    "instrument": instrument,
                    "kind": rng.choice(("chorale", *KINDS)),
                    "tempo_bpm": rng.randint(48, 160),
                    "metre": rng.choice(["4/4", "3/4", "6/8", "2/2"]),
                    "key": key[0],
                    "mode": key[1],
                    "dynamics": dynamics,
                }
            )
    return rows


def all_captions() -> list[tuple[dict[str, Any], str]]:
    rng = random.Random(1)
    return [(facts, text) for facts in many_facts() for text in write_captions(facts, rng)]


def test_every_statement_is_a_fact() -> None:
    for facts, text in all_captions():
        low = text.lower()
        for found in KEY.finditer(text):
            assert facts["key"] is not None, text
            assert found.group(0) in key_names(facts["key"], facts["mode"]), text
        assert set(MODE.findall(text)) <= {facts["mode"]}, text
        for metre in re.findall(r"\d/\d", text):
            assert metre == facts["metre"], text
        if "waltz" in low:
            assert facts["kind"] == "waltz", text
        for number in re.findall(r"(\d+) bpm", text):
            assert abs(int(number) - facts["tempo_bpm"]) <= (2.5 if "about" in low else 0), text
        for words in DYNAMIC_WORDS.values():
            for word in words & set(re.findall(r"\w+", low)):
                assert word in DYNAMIC_WORDS[facts["dynamics"]], text
        true_tempi = tempo_words(facts["tempo_bpm"])
        for word in re.findall(
            "very slow|slow|moderate|walking|medium-tempo|very fast|fast|lively", low
        ):
            assert word in true_tempi, text
        for name, other in INSTRUMENTS.items():
            if name != facts["instrument"]:
                assert not any(re.search(rf"\b{w}\b", low) for w in other.words), text
        if facts["kind"] != "chorale":
            assert not re.search("hymn|chorale|church music|bach", low), text
        else:
            assert "solo" not in low, text
        for kind in ("reel", "hornpipe", "slip jig", "march"):
            assert kind not in low or kind == facts["kind"], text


def test_only_a_waltz_is_in_waltz_time() -> None:
    def texts(kind: str) -> str:
        facts = FACTS | {"kind": kind, "metre": "3/4"}
        rows = (write_captions(facts, random.Random(seed)) for seed in range(100))
        return " | ".join(text for row in rows for text in row)

    assert "in waltz time" in texts("waltz")
    for kind in ("chorale", "air"):
        assert "waltz" not in texts(kind) and "in 3/4" in texts(kind)


def test_nothing_unknown_is_printed() -> None:
    for _, text in all_captions():
        assert "None" not in text and "  " not in text and not text.startswith((",", " ")), text


def test_most_captions_name_the_instrument() -> None:
    named = [
        any(word in text.lower() for word in (*INSTRUMENTS[facts["instrument"]].words, "choral"))
        for facts, text in all_captions()
    ]
    assert 0.88 < sum(named) / len(named) < 0.97


def test_captions_of_a_clip_differ_and_follow_the_seed() -> None:
    captions = write_captions(FACTS, random.Random(3))
    assert len({text.lower() for text in captions}) == len(captions) == NUM_CAPTIONS
    assert captions == write_captions(FACTS, random.Random(3))
    assert captions != write_captions(FACTS, random.Random(4))


def test_wording_varies() -> None:
    texts = " | ".join(
        text for seed in range(200) for text in write_captions(FACTS, random.Random(seed))
    )
    for words in (
        "B flat minor",
        "Bb minor",
        "in 6/8",
        "about 120 bpm",
        "120 bpm",
        "quiet",
        "solo",
    ):
        assert words in texts


@pytest.mark.parametrize(
    ("bpm", "word"),
    [
        (59, "very slow"),
        (60, "slow"),
        (80, "moderate"),
        (111, "walking"),
        (112, "fast"),
        (144, "very fast"),
    ],
)
def test_tempo_words(bpm: int, word: str) -> None:
    assert word in tempo_words(bpm)
