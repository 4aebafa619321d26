"""Words of captions and prompts, as they are compared."""

import random

import pytest

from musiclm_engine.data.captions import write_captions
from musiclm_engine.mulan.words import vocabulary, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Slow F# minor hymn, in 3/4!", ["slow", "f#", "minor", "hymn", "in", "3/4"]),
        ("mid-tempo; B flat, 112 BPM.", ["mid", "tempo", "b", "flat", "112", "bpm"]),
        ("O'Neill’s “jig”", ["o'neill's", "jig"]),
        ("ＦＬＵＴＥ _solo_", ["flute", "solo"]),  # NFKC, as the tokenizer
        ("Élégie à deux, C♯", ["élégie", "à", "deux", "c"]),
        ("c# d#minor 12/8", ["c#", "d#", "minor", "12/8"]),
        ("120bpm, B-flat 4th", ["120", "bpm", "b", "flat", "4", "th"]),
        (" \n-- ", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_vocabulary_holds_each_word_once() -> None:
    assert vocabulary(["a flute", "A slow flute", "in 3/4"]) == ["3/4", "a", "flute", "in", "slow"]
    assert vocabulary([]) == []


def test_captions_hold_no_word_that_is_not_known_afterwards() -> None:
    facts = {
        "instrument": "violin",
        "kind": "reel",
        "tempo_bpm": 120,
        "metre": "4/4",
        "key": "F#",
        "mode": "minor",
        "dynamics": "loud",
        "origin": "Irish",
    }
    captions = [
        caption.text for seed in range(50) for caption in write_captions(facts, random.Random(seed))
    ]
    known = set(vocabulary(captions))
    assert all(set(words(text)) <= known for text in captions)
    assert {"violin", "reel", "f#", "120", "fiery", "irish", "4/4"} <= known
    assert [word for word in words("an electric violin reel") if word not in known] == ["electric"]
