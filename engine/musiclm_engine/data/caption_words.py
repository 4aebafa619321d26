"""What may be said of a clip, in which words: every word here holds of the facts that allow it.

A tempo counts quarter notes, in compound metres dotted quarters, as the facts do.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from musiclm_engine.data.scores import COMPOUND_METRES

Facts = Mapping[str, Any]

SLOW_BELOW_BPM = 80
FAST_FROM_BPM = 112
DANCES = (
    *("reel", "hornpipe", "jig", "slip jig", "strathspey", "clog", "highland fling", "waltz"),
    *("slide", "gavotte", "minuet", "polka", "allemande"),
)
_NOT_BRIGHT = ("chorale", "lament", "lullaby")
# A number rounded to the nearest five is said only where it errs by no more than this share.
MOST_ROUNDING = 0.02

# Tempo: [from, below) in beats a minute.

_TEMPO_ADJECTIVES: tuple[tuple[float, float, tuple[str, ...]], ...] = (
    (0, 60, ("very slow", "largo")),
    (0, SLOW_BELOW_BPM, ("slow",)),
    (66, 77, ("adagio",)),
    (77, 108, ("andante",)),
    (SLOW_BELOW_BPM, FAST_FROM_BPM, ("moderate", "medium-tempo", "mid-tempo")),
    (FAST_FROM_BPM, float("inf"), ("fast", "quick")),
    (FAST_FROM_BPM, 144, ("lively",)),
    (120, 156, ("allegro", "brisk")),
    (144, float("inf"), ("very fast", "rapid")),
)
_TEMPO_PHRASES: tuple[tuple[float, float, tuple[str, ...]], ...] = (
    (0, 60, ("at a very slow tempo",)),
    (0, SLOW_BELOW_BPM, ("at a slow tempo", "at a slow pace")),
    (SLOW_BELOW_BPM, FAST_FROM_BPM, ("at a moderate tempo", "at a medium tempo")),
    (SLOW_BELOW_BPM, FAST_FROM_BPM, ("at a walking pace",)),
    (FAST_FROM_BPM, float("inf"), ("at a fast tempo", "at a quick pace")),
    (FAST_FROM_BPM, 144, ("at a lively pace",)),
    (144, float("inf"), ("at a very fast tempo",)),
)
_TEMPO_ADVERBS: tuple[tuple[float, float, tuple[str, ...]], ...] = (
    (0, SLOW_BELOW_BPM, ("slowly",)),
    (FAST_FROM_BPM, float("inf"), ("fast", "quickly")),
)

# Loudness: what stands before a noun, after `played`, and after all.

DYNAMIC_ADJECTIVES = {"soft": ("soft", "quiet"), "medium": (), "loud": ("loud", "strong")}
DYNAMIC_ADVERBS = {"soft": ("softly", "quietly"), "medium": (), "loud": ("loudly", "strongly")}
DYNAMIC_PHRASES = {
    "soft": ("at a low volume",),
    "medium": ("at a medium volume", "at medium volume"),
    "loud": ("at a high volume",),
}

# What a kind of piece is called, and more general names that hold of it too.

_KINDS = {
    "chorale": (
        *("chorale", "hymn", "chorale", "hymn", "church hymn", "Bach chorale", "hymn tune"),
        *("four-part chorale", "baroque chorale", "four-part hymn"),
    ),
    "clog": ("clog dance", "clog"),
    "folk tune": ("folk tune", "folk melody", "traditional tune", "traditional melody"),
    "strathspey": ("strathspey", "strathspey", "Scottish strathspey"),
    "highland fling": ("highland fling", "highland fling", "Scottish highland fling"),
}
_ANY_MUSIC = ("piece", "music", "piece of music")
_CHURCH_MUSIC = (
    *("church music", "sacred music", "four-part music", "baroque music", "classical music"),
)
_TUNES = ("tune", "melody", "old tune", "folk music", "traditional music")
_DANCE_TUNES = ("dance", "dance tune", "folk dance", "traditional dance")

# The families of instruments: as players, and before a noun.

_FAMILY_PLAYERS = {
    "keyboard": ("keyboard instrument", "keyboard"),
    "woodwind": ("woodwind instrument", "woodwind", "wind instrument"),
    "voices": ("singers", "vocal ensemble", "group of singers"),
}
_STRING_PLAYERS = {
    "violin": ("bowed string instrument", "string instrument"),
    "strings": ("bowed strings", "bowed string instruments"),
    "guitar": ("plucked string instrument", "plucked strings", "string instrument"),
}
FAMILY_ADJUNCTS = {
    "keyboard": "keyboard",
    "bowed strings": "bowed string",
    "plucked strings": "plucked string",
    "woodwind": "woodwind",
    "voices": "vocal",
}
PLURAL_PLAYERS = (
    *("strings", "voices", "choral voices", "singers"),
    *("bowed strings", "bowed string instruments", "plucked strings"),
)

_METRES_SPOKEN = {
    "2/2": "two-two",
    "2/4": "two-four",
    "3/4": "three-four",
    "4/4": "four-four",
    "6/8": "six-eight",
    "9/8": "nine-eight",
    "12/8": "twelve-eight",
}
_METRES_BY_NAME = {
    "2/2": ("cut time", "duple time"),
    "2/4": ("two", "duple time"),
    "3/4": ("three", "triple time"),
    "4/4": ("four", "common time"),
    **dict.fromkeys(COMPOUND_METRES, ("compound time",)),
}
# Key notes that have two customary names.
_OTHER_NAMES = {
    "major": {"F#": "Gb", "Db": "C#"},
    "minor": {"Eb": "D#", "G#": "Ab", "Bb": "A#"},
}


def _is_slow(facts: Facts) -> bool:
    return bool(facts["tempo_bpm"] < SLOW_BELOW_BPM)


def _is_fast(facts: Facts) -> bool:
    return bool(facts["tempo_bpm"] >= FAST_FROM_BPM)


def _is_chorale(facts: Facts) -> bool:
    return bool(facts["kind"] == "chorale")


# A mood: the facts that make it true, and its words.
_MOODS: dict[str, tuple[Callable[[Facts], bool], tuple[str, ...]]] = {
    "solemn": (
        lambda f: _is_chorale(f) and f["mode"] == "minor" and _is_slow(f),
        ("solemn", "sombre", "grave"),
    ),
    "majestic": (
        lambda f: (
            _is_chorale(f)
            and f["dynamics"] == "loud"
            and _is_slow(f)
            and f["instrument"] in ("church organ", "choir", "strings")
        ),
        ("majestic", "grand", "stately"),
    ),
    "reverent": (
        lambda f: _is_chorale(f) and f["dynamics"] == "soft" and _is_slow(f),
        ("reverent", "devotional"),
    ),
    "peaceful": (
        lambda f: f["mode"] == "major" and f["dynamics"] == "soft" and _is_slow(f),
        ("peaceful", "calm", "serene", "relaxing"),
    ),
    "gentle": (
        lambda f: f["dynamics"] == "soft" and not _is_fast(f),
        ("gentle",),
    ),
    "tender": (
        lambda f: not _is_chorale(f) and f["dynamics"] == "soft" and _is_slow(f),
        ("tender", "dreamy"),
    ),
    "sad": (
        lambda f: f["mode"] == "minor" and _is_slow(f),
        ("sad", "mournful", "sorrowful"),
    ),
    "wistful": (
        lambda f: not _is_chorale(f) and f["mode"] in ("minor", "dorian") and _is_slow(f),
        ("wistful", "melancholy", "plaintive"),
    ),
    "merry": (
        lambda f: f["kind"] in DANCES and f["mode"] == "major" and _is_fast(f),
        ("merry", "cheerful", "happy", "joyful", "jolly"),
    ),
    "bright": (
        lambda f: f["kind"] not in _NOT_BRIGHT and f["mode"] == "major" and _is_fast(f),
        ("bright", "upbeat"),
    ),
    "energetic": (
        lambda f: f["dynamics"] == "loud" and _is_fast(f),
        ("energetic", "spirited", "vigorous"),
    ),
    "fiery": (
        lambda f: f["mode"] == "minor" and f["dynamics"] == "loud" and _is_fast(f),
        ("fiery", "dramatic"),
    ),
    "lilting": (
        lambda f: not _is_chorale(f) and f["metre"] in COMPOUND_METRES,
        ("lilting",),
    ),
}


def moods_of(facts: Facts) -> list[str]:
    """The moods whose conditions the facts meet; none for a third of the built-in corpus."""
    return [name for name, (holds, _) in _MOODS.items() if holds(facts)]


def mood_words(facts: Facts) -> tuple[str, ...]:
    return tuple(word for name in moods_of(facts) for word in _MOODS[name][1])


def tempo_words(tempo_bpm: float) -> tuple[str, ...]:
    """The adjectives that are true of a tempo."""
    return _within(_TEMPO_ADJECTIVES, tempo_bpm)


def tempo_phrases(tempo_bpm: float) -> tuple[str, ...]:
    """What may follow the name of a piece: `at a slow tempo`."""
    return _within(_TEMPO_PHRASES, tempo_bpm)


def tempo_adverbs(tempo_bpm: float) -> tuple[str, ...]:
    """What may follow `played`; none for what is neither slow nor fast."""
    return _within(_TEMPO_ADVERBS, tempo_bpm)


def _within(
    table: tuple[tuple[float, float, tuple[str, ...]], ...], tempo_bpm: float
) -> tuple[str, ...]:
    return tuple(w for low, high, words in table if low <= tempo_bpm < high for w in words)


def round_tempo(tempo_bpm: float) -> int | None:
    """The nearest multiple of five, where it is within MOST_ROUNDING of the truth."""
    rounded = 5 * round(tempo_bpm / 5)
    return rounded if abs(rounded - tempo_bpm) <= MOST_ROUNDING * tempo_bpm else None


def key_names(key: str, mode: str) -> tuple[str, ...]:
    """Ways to say a key, the usual first: `Bb minor`, `B flat minor`, `B-flat minor`, `A# minor`, …"""
    other = _OTHER_NAMES.get(mode, {}).get(key)
    names = [
        note.replace("b", flat).replace("#", sharp)
        for note in ((key,) if other is None else (key, other))
        for flat, sharp in (("b", "#"), (" flat", " sharp"), ("-flat", "-sharp"))
    ]
    return tuple(dict.fromkeys(f"{name} {mode}" for name in names))


def metre_names(metre: str, kind: str) -> tuple[str, ...]:
    """What may follow `in`: `3/4`, `three-four time`, `triple time`; `waltz time` for a waltz."""
    names = [metre, f"{metre} time"]
    if metre in _METRES_SPOKEN:
        names += [f"{_METRES_SPOKEN[metre]} time", *_METRES_BY_NAME[metre]]
    if kind == "waltz" and metre == "3/4":
        names += ["waltz time"] * 4
    return tuple(names)


def kind_names(facts: Facts) -> tuple[str, ...]:
    """What the score calls the piece, in other words too: `hymn`, `Irish jig`."""
    kind = facts["kind"]
    names = _KINDS.get(kind, (kind,))
    if facts.get("origin"):
        names += tuple(f"{facts['origin']} {name}" for name in names[:2])
    return names


def general_names(facts: Facts) -> tuple[str, ...]:
    """What the piece may be called without saying its kind."""
    if _is_chorale(facts):
        return _ANY_MUSIC + _CHURCH_MUSIC
    return _ANY_MUSIC + _TUNES + (_DANCE_TUNES if facts["kind"] in DANCES else ())


def family_players(instrument: str, family: str) -> tuple[str, ...]:
    """An instrument by its family: `keyboard instrument`, `bowed strings`."""
    return _STRING_PLAYERS.get(instrument) or _FAMILY_PLAYERS[family]


def article(words: str) -> str:
    """`words` after `a` or `an`; letters that name keys are read aloud: an F minor tune."""
    vowel = re.match(r"[AEF](b|#)?(?=[\s-])|[aeiouAEIO]", words)
    return f"{'an' if vowel else 'a'} {words}"
