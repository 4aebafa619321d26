"""Captions say only what is so, and say which facts they state.

The reader below knows the language of captions on its own: it takes nothing from the code that writes
them, reads a caption back into claims, and accounts for every word.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from musiclm_engine.data.build import plan_clip
from musiclm_engine.data.captions import NUM_CAPTIONS, Caption, write_captions
from musiclm_engine.data.instruments import DYNAMICS, INSTRUMENTS

Facts = dict[str, Any]

# The reader: what each expression claims, as (the fact it states or "", whether it holds).

INSTRUMENT_WORDS = {
    "church organ": "church organ, organ, pipe organ",
    "piano": "piano, grand piano",
    "harpsichord": "harpsichord",
    "strings": "strings, string ensemble, string orchestra",
    "choir": "choir, voices, choral voices, choral, chorus",
    "flute": "flute",
    "violin": "violin, fiddle",
    "guitar": "guitar, nylon guitar, classical guitar, acoustic guitar, nylon-string guitar, "
    "Spanish guitar",
}
FAMILY_WORDS = {
    ("church organ", "piano", "harpsichord"): "keyboard instrument, keyboard",
    ("flute",): "woodwind instrument, woodwind, wind instrument",
    ("violin", "strings"): "bowed string instrument, bowed strings, bowed string instruments, "
    "bowed string",
    ("guitar",): "plucked string instrument, plucked strings, plucked string",
    ("violin", "guitar"): "string instrument",
    ("choir",): "singers, group of singers, vocal ensemble, vocal",
}
KIND_WORDS = {
    "chorale": "chorale, hymn, church hymn, Bach chorale, hymn tune",
    "folk tune": "folk tune, folk melody, traditional tune, traditional melody",
    "clog": "clog dance, clog",
    **{
        kind: kind
        for kind in (
            *("reel", "jig", "slip jig", "hornpipe", "strathspey", "highland fling", "waltz"),
            *("march", "slide", "air", "gavotte", "minuet", "polka", "quickstep", "lament"),
            *("planxty", "allemande", "lullaby"),
        )
    },
}
DANCE_KINDS = (
    *("reel", "jig", "slip jig", "hornpipe", "strathspey", "clog", "highland fling", "waltz"),
    *("slide", "gavotte", "minuet", "polka", "allemande"),
)
TEMPO_WORDS = {  # from, below
    (0, 60): "very slow, largo, at a very slow tempo",
    (0, 80): "slow, slowly, at a slow tempo, at a slow pace",
    (66, 77): "adagio",
    (77, 108): "andante",
    (80, 112): "moderate, medium-tempo, mid-tempo, at a moderate tempo, at a medium tempo, "
    "at a walking pace",
    (112, 999): "fast, quick, quickly, at a fast tempo, at a quick pace",
    (112, 144): "lively, at a lively pace",
    (120, 156): "allegro, brisk",
    (144, 999): "very fast, rapid, at a very fast tempo",
}
DYNAMIC_WORDS = {
    "soft": "soft, quiet, softly, quietly, at a low volume, volume: low",
    "medium": "at a medium volume, at medium volume, medium volume, volume: medium, "
    "neither loud nor soft",
    "loud": "loud, strong, loudly, strongly, at a high volume, volume: high",
}
METRE_WORDS = {
    "2/2": "two-two time, cut time, duple time, in two",
    "2/4": "two-four time, duple time, in two",
    "3/4": "three-four time, triple time, in three, waltz time",
    "4/4": "four-four time, common time, in four",
    "6/8": "six-eight time, compound time",
    "9/8": "nine-eight time, compound time",
    "12/8": "twelve-eight time, compound time",
}
MOOD_WORDS: dict[str, Callable[[Facts], bool]] = {
    "solemn, sombre, grave": lambda f: (
        f["kind"] == "chorale" and f["mode"] == "minor" and f["tempo_bpm"] < 80
    ),
    "majestic, grand, stately": lambda f: (
        f["kind"] == "chorale"
        and f["dynamics"] == "loud"
        and f["tempo_bpm"] < 80
        and f["instrument"] in ("church organ", "choir", "strings")
    ),
    "reverent, devotional": lambda f: (
        f["kind"] == "chorale" and f["dynamics"] == "soft" and f["tempo_bpm"] < 80
    ),
    "peaceful, calm, serene, relaxing": lambda f: (
        f["mode"] == "major" and f["dynamics"] == "soft" and f["tempo_bpm"] < 80
    ),
    "gentle": lambda f: f["dynamics"] == "soft" and f["tempo_bpm"] < 112,
    "tender, dreamy": lambda f: (
        f["kind"] != "chorale" and f["dynamics"] == "soft" and f["tempo_bpm"] < 80
    ),
    "sad, mournful, sorrowful": lambda f: f["mode"] == "minor" and f["tempo_bpm"] < 80,
    "wistful, melancholy, plaintive": lambda f: (
        f["kind"] != "chorale" and f["mode"] in ("minor", "dorian") and f["tempo_bpm"] < 80
    ),
    "merry, cheerful, happy, joyful, jolly": lambda f: (
        f["kind"] in DANCE_KINDS and f["mode"] == "major" and f["tempo_bpm"] >= 112
    ),
    "bright, upbeat": lambda f: (
        f["kind"] not in ("chorale", "lament", "lullaby")
        and f["mode"] == "major"
        and f["tempo_bpm"] >= 112
    ),
    "energetic, spirited, vigorous": lambda f: f["dynamics"] == "loud" and f["tempo_bpm"] >= 112,
    "fiery, dramatic": lambda f: (
        f["mode"] == "minor" and f["dynamics"] == "loud" and f["tempo_bpm"] >= 112
    ),
    "lilting": lambda f: f["kind"] != "chorale" and f["metre"] in ("6/8", "9/8", "12/8"),
}
# Words that state none of the facts, and still are not true of everything.
OTHER_WORDS: dict[str, Callable[[Facts], bool]] = {
    "four-part, baroque, sacred, church music, sacred music, classical music": lambda f: (
        f["kind"] == "chorale"
    ),
    "tune, melody, old, traditional, folk music, traditional music, solo, single": lambda f: (
        f["kind"] != "chorale"
    ),
    "dance, dance tune, folk dance, traditional dance": lambda f: f["kind"] in DANCE_KINDS,
    "Irish": lambda f: f["origin"] == "Irish",
    "Scottish": lambda f: f["kind"] in ("strathspey", "highland fling"),
    "sing, sings, singing, sung": lambda f: f["instrument"] == "choir",
    "play, plays, playing, played": lambda f: f["instrument"] != "choir",
}
GLUE = re.compile(
    "an?|the|in|on|at|by|for|of|and|this|one|it|is|here|listen|to|music|piece|performed|time"
    "|instrument:|tempo:|key:|mood:|signature:|:"
)


def lexicon() -> dict[str, list[tuple[str, Callable[[Facts], bool]]]]:
    meanings: dict[str, list[tuple[str, Callable[[Facts], bool]]]] = {}

    def add(words: str, fact: str, holds: Callable[[Facts], bool]) -> None:
        for word in words.split(", "):
            meanings.setdefault(word.lower(), []).append((fact, holds))

    for name, words in INSTRUMENT_WORDS.items():
        add(words, "instrument", lambda f, name=name: f["instrument"] == name)
    for names, words in FAMILY_WORDS.items():
        add(words, "family", lambda f, names=names: f["instrument"] in names)
    for kind, words in KIND_WORDS.items():
        add(words, "kind", lambda f, kind=kind: f["kind"] == kind)
    for (low, high), words in TEMPO_WORDS.items():
        add(words, "tempo_word", lambda f, at=(low, high): at[0] <= f["tempo_bpm"] < at[1])
    for level, words in DYNAMIC_WORDS.items():
        add(words, "dynamics", lambda f, level=level: f["dynamics"] == level)
    for metre, words in METRE_WORDS.items():
        add(words, "metre", lambda f, metre=metre: f["metre"] == metre)
    for words, holds in MOOD_WORDS.items():
        add(words, "mood", holds)
    for words, holds in OTHER_WORDS.items():
        add(words, "", holds)
    meanings["waltz time"] = [("metre", lambda f: f["kind"] == "waltz" and f["metre"] == "3/4")]
    return meanings


LEXICON = lexicon()
EXPRESSION = re.compile(
    r"(?<![\w-])("
    + "|".join(re.escape(word) for word in sorted(LEXICON, key=len, reverse=True))
    + r")(?![\w-])"
)
KEY = re.compile(r"\b([A-G])(b|#|[ -]flat|[ -]sharp)? (major|minor|\w+ian)\b")
MODE = re.compile(
    r"\b(?:in (?:a|the) |mode: )?(major|minor|dorian|mixolydian|lydian|phrygian)\b(?: key\b| mode\b)?"
)
NUMBER = r"(about |around |roughly )?(\d+)(?![\d/])"
BPM = re.compile(
    rf"{NUMBER}(?: ?bpm| beats (?:per|a) minute)"
    rf"|(?:bpm:|tempo:|at a tempo of|(?<![\w-])tempo) {NUMBER}(?: bpm)?"
)
METRE = re.compile(r"\b(\d+/\d+)(?: time)?")


def pitch_class(letter: str, accidental: str) -> int:
    natural = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter]
    return (natural + {"": 0, "b": -1, "f": -1, "#": 1, "s": 1}[accidental.strip(" -")[:1]]) % 12


def read(text: str, facts: Facts) -> tuple[set[str], list[str]]:
    """The facts that a caption states, and what in it is not so or not understood."""
    stated: set[str] = set()
    wrong: list[str] = []

    def claim(fact: str, holds: bool, words: str) -> str:
        stated.update({fact} - {""})
        if not holds:
            wrong.append(words)
        return " | "

    def key(m: re.Match[str]) -> str:
        true = facts["key"]
        holds = (
            true is not None
            and pitch_class(m[1], m[2] or "") == pitch_class(true[0], true[1:])
            and m[3] == facts["mode"]
        )
        return claim("key", holds, m[0])

    def bpm(m: re.Match[str]) -> str:
        about, number = (m[1], m[2]) if m[2] else (m[3], m[4])
        most = 0.02 * facts["tempo_bpm"] if about else 0.0
        return claim("tempo_bpm", abs(int(number) - facts["tempo_bpm"]) <= most, m[0])

    text = KEY.sub(key, text).lower().replace("the key of", " ").replace("key of", " ")
    text = BPM.sub(bpm, text)
    text = METRE.sub(lambda m: claim("metre", m[1] == facts["metre"], m[0]), text)
    text = MODE.sub(lambda m: claim("mode", m[1] == facts["mode"], m[0]), text)
    found: set[str] = set()

    def expression(m: re.Match[str]) -> str:
        found.add(m[0])
        meanings = LEXICON[m[0]]
        (fact,) = {fact for fact, _ in meanings}
        return claim(fact, any(holds(facts) for _, holds in meanings), m[0])

    text = EXPRESSION.sub(expression, text)
    if "traditional" in found and {"tune", "melody"} & found:  # a traditional flute tune
        claim("kind", facts["kind"] == "folk tune", "traditional")
    rest = [word for word in re.findall(r"[^\s|,.;]+", text) if not GLUE.fullmatch(word)]
    return stated, wrong + rest


# What is read


KEYS: tuple[tuple[str | None, str | None], ...] = (
    *((note, "major") for note in ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb")),
    *((note, "minor") for note in ("E", "Bb", "G#", "A", "C#", "Eb", "F", "B")),
    *(("F#", "dorian"), ("A", "mixolydian"), ("D", "lydian"), ("B", "phrygian"), (None, None)),
)


def random_facts(rng: random.Random) -> Facts:
    kind = rng.choice(("chorale", "chorale", *KIND_WORDS))
    key = rng.choice(KEYS)
    return {
        "instrument": rng.choice(list(INSTRUMENTS)),
        "kind": kind,
        "tempo_bpm": rng.randint(48, 160),
        "metre": rng.choice(list(METRE_WORDS)),
        "key": key[0],
        "mode": key[1],
        "dynamics": rng.choice(DYNAMICS),
        "origin": rng.choice((None, "Irish")) if kind != "chorale" else None,
    }


def captioned(count: int, seed: int = 0) -> list[tuple[Facts, tuple[Caption, ...]]]:
    rng = random.Random(seed)
    rows = [random_facts(rng) for _ in range(count)]
    return [(facts, write_captions(facts, rng)) for facts in rows]


@pytest.fixture(scope="module")
def random_rows() -> list[tuple[Facts, tuple[Caption, ...]]]:
    return captioned(2500)


@pytest.fixture(scope="module")
def corpus_rows() -> list[tuple[Facts, tuple[Caption, ...]]]:
    plans = [plan_clip(0, index, 10.0) for index in range(600)]
    return [(plan.facts, plan.captions) for plan in plans]


def test_every_claim_is_a_fact_and_is_declared(random_rows: Any, corpus_rows: Any) -> None:
    for facts, captions in random_rows + corpus_rows:
        for text, declared in captions:
            stated, wrong = read(text, facts)
            assert not wrong, (text, wrong, facts)
            assert stated == declared, (text, facts)


FLUTE_JIG: Facts = {
    "instrument": "flute",
    "kind": "jig",
    "tempo_bpm": 104,
    "metre": "6/8",
    "key": "Bb",
    "mode": "minor",
    "dynamics": "soft",
    "origin": None,
}


@pytest.mark.parametrize(
    ("text", "lie"),
    [
        ("a violin jig", "violin"),
        ("a jig on a string instrument", "string instrument"),
        ("a reel on a flute", "reel"),
        ("a slip jig", "slip jig"),
        ("an Irish jig", "irish"),
        ("a jig in B minor", "B minor"),
        ("a jig in Bb major", "Bb major"),
        ("a jig in a major key", "in a major key"),
        ("a jig at 105 bpm", "105 bpm"),
        ("a jig at about 110 bpm", "about 110 bpm"),
        ("tempo 105, flute", "tempo 105"),
        ("a jig in 9/8", "9/8"),
        ("a jig in common time", "common time"),
        ("a jig in waltz time", "waltz time"),
        ("a fast jig", "fast"),
        ("a slow jig", "slow"),
        ("a loud jig", "loud"),
        ("a merry jig", "merry"),
        ("a solemn jig", "solemn"),
        ("a flute sings a jig", "sings"),
        ("a four-part jig", "four-part"),
        ("an Elizabethan jig", "elizabethan"),
    ],
)
def test_the_reader_sees_what_is_not_so(text: str, lie: str) -> None:
    assert read(text, FLUTE_JIG)[1] == [lie]


def test_the_reader_reads_what_is_so() -> None:
    text = "A flute softly playing a gentle, lilting jig in B flat minor, in 6/8, at about 105 bpm."
    facts = {"instrument", "kind", "key", "mood", "metre", "tempo_bpm", "dynamics"}
    assert read(text, FLUTE_JIG) == (facts, [])


def test_the_first_caption_states_what_the_model_is_judged_on(random_rows: Any) -> None:
    for facts, ((text, stated), *_) in random_rows:
        wanted = {"instrument", "kind", "tempo_bpm"} | ({"key"} if facts["key"] else set())
        assert wanted <= stated
        assert re.search(rf"(?<!\d){facts['tempo_bpm']}(?!\d)", text), text  # exact
        assert not re.search("about|around|roughly", text), text


def test_captions_of_a_clip_differ_and_follow_the_seed(random_rows: Any) -> None:
    for _, captions in random_rows:
        texts = {caption.text.lower().rstrip(".") for caption in captions}
        assert len(texts) == len(captions) == NUM_CAPTIONS == 8
    captions = write_captions(FLUTE_JIG, random.Random(3))
    assert captions == write_captions(FLUTE_JIG, random.Random(3))
    assert captions != write_captions(FLUTE_JIG, random.Random(4))


def test_captions_state_facts_in_their_shares(corpus_rows: Any) -> None:
    rows = [(facts, stated) for facts, captions in corpus_rows for _, stated in captions]

    def share(*names: str, of: Callable[[Facts], bool] = lambda _: True) -> float:
        told = [bool(stated & set(names)) for facts, stated in rows if of(facts)]
        return sum(told) / len(told)

    assert 0.87 < share("instrument", "family") < 0.94
    assert 0.46 < share("tempo_bpm") < 0.54
    assert 0.57 < share("key", of=lambda facts: facts["key"] is not None) < 0.66
    for name in ("family", "kind", "mode", "tempo_word", "metre", "dynamics", "mood"):
        assert 0.08 < share(name) < 0.75, name
    sizes = [len(stated) for _, stated in rows]
    assert min(sizes) == 1 and max(sizes) >= 7


NOT_BETWEEN = "plays?|playing|sings?|singing|of|for|on|by|at|in|tempo|pace|key|mode|volume|minute"
ARTICLE_BEFORE_MUSIC = re.compile(
    r"\b[Aa]n? (?!major|minor|flat|sharp|\w+ian)"  # the note A
    rf"(?:(?!(?:{NOT_BETWEEN})\b)[\w#-]+,? )*music\b"
)


def test_punctuation_spaces_and_articles(random_rows: Any) -> None:
    an = re.compile(r"[aeiou]|(?:A|E|F)(?:b|#)?$", re.ASCII)
    for _, captions in random_rows:
        for text, _ in captions:
            assert text == text.strip() and "None" not in text and "  " not in text, text
            assert not re.search(r"\s[,.;:]|[,;:]$|[,.;:]{2}|^[,.;:]", text), text
            assert not re.search(r"[,.;:](?=\S)", text), text
            for article, word in re.findall(r"\b([Aa]n?) ([\w#]+)", text):
                if article == "A" and word in ("major", "minor", "flat", "sharp"):
                    continue  # a key
                vowel = an.match(word) or word[0] in "IO"
                assert article.lower() == ("an" if vowel else "a"), text
            assert not ARTICLE_BEFORE_MUSIC.search(text), text


def test_only_a_waltz_is_in_waltz_time() -> None:
    def texts(kind: str) -> str:
        facts = FLUTE_JIG | {"kind": kind, "metre": "3/4"}
        rows = (write_captions(facts, random.Random(seed)) for seed in range(100))
        return " | ".join(caption.text for row in rows for caption in row)

    assert "in waltz time" in texts("waltz")
    for kind in ("chorale", "air"):
        assert "waltz" not in texts(kind) and "in 3/4" in texts(kind) and "in three" in texts(kind)


def test_wording_varies() -> None:
    texts = [
        caption.text
        for seed in range(400)
        for caption in write_captions(FLUTE_JIG, random.Random(seed))
    ]
    assert len(set(texts)) > 2500  # of 3200, for the same facts
    joined = " | ".join(texts)
    for words in (
        *(
            "B flat minor",
            "Bb minor",
            "A# minor",
            "B-flat minor",
            "in a minor key",
            "key: B",
            "in the key of",
        ),
        *("in 6/8", "compound time", "six-eight", "about 105 bpm", "104 bpm", "tempo 104"),
        *("104bpm", "bpm: 104"),
        *("104 beats per minute", "softly", "quiet", "at a low volume", "lilting", "gentle"),
        *("solo", "woodwind", "wind instrument", "dance", "moderate", "andante", "walking pace"),
        *("A flute plays", "flute playing", "It is", "for a flute", "time signature: 6/8"),
    ):
        assert words in joined, words
    sizes = sorted(len(text.split()) for text in texts)
    assert sizes[0] == 1 and sizes[-1] > 18
