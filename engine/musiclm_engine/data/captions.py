"""Captions for a clip, from its facts and nothing else.

Facts are `instrument`, `kind`, `tempo_bpm`, `metre`, `key`, `mode` and `dynamics`; a caption may leave
any out, and what is None is never said. Eleven captions in twelve name the instrument.
"""

import random
from collections.abc import Mapping
from typing import Any

from musiclm_engine.data.instruments import INSTRUMENTS

NUM_CAPTIONS = 6

# Upper limits in beats a minute, and the words for what lies below.
_TEMPI: tuple[tuple[float, tuple[str, ...]], ...] = (
    (60, ("very slow",)),
    (80, ("slow",)),
    (112, ("moderate", "walking", "medium-tempo")),
    (144, ("fast", "lively")),
    (float("inf"), ("very fast",)),
)
_DYNAMICS = {"soft": ("soft", "quiet", "gentle"), "medium": (), "loud": ("loud", "strong")}
_KINDS = {
    "chorale": ("chorale", "hymn", "chorale", "hymn", "church hymn", "Bach chorale"),
    "clog": ("clog dance",),
    "folk tune": ("folk tune", "folk melody", "traditional tune"),
}
# Before a noun some instruments change their name: a choral hymn, not a voices hymn.
_BEFORE_NOUN = {
    "choir": ("choral", "choir"),
    "strings": ("string orchestra", "string ensemble", "strings"),
}
_PLURAL = ("strings", "voices", "choral voices")


def tempo_words(tempo_bpm: float) -> tuple[str, ...]:
    """The words that are true of a tempo."""
    return next(words for limit, words in _TEMPI if tempo_bpm < limit)


def key_names(key: str, mode: str) -> tuple[str, ...]:
    """Ways to say a key: `Bb minor`, `B flat minor`."""
    spoken = key.replace("b", " flat").replace("#", " sharp")
    return (f"{key} {mode}",) if spoken == key else (f"{key} {mode}", f"{spoken} {mode}")


def write_captions(facts: Mapping[str, Any], rng: random.Random) -> tuple[str, ...]:
    """NUM_CAPTIONS different captions, from full sentences to lists of tags."""
    shapes = [_sentence, _sentence, _phrase, _phrase, _tags, _partial]
    captions: list[str] = []
    while len(captions) < NUM_CAPTIONS:
        caption = shapes[len(captions)](_Words(facts, rng))
        if caption.lower() not in (known.lower() for known in captions):
            captions.append(caption)
    return tuple(captions)


class _Words:
    """One draw of words for each fact; empty where the fact is unknown or left unsaid."""

    def __init__(self, facts: Mapping[str, Any], rng: random.Random) -> None:
        self.rng = rng
        self.name = facts["instrument"]
        self.instrument = rng.choice(INSTRUMENTS[facts["instrument"]].words)
        self.adjective = rng.choice(_BEFORE_NOUN.get(self.name, (self.instrument,)))
        self.kind = rng.choice(_KINDS.get(facts["kind"], (facts["kind"],)))
        self.is_chorale = facts["kind"] == "chorale"
        self.is_waltz = facts["kind"] == "waltz"
        self.tempo = rng.choice(tempo_words(facts["tempo_bpm"]))
        bpm = facts["tempo_bpm"]
        self.bpm = rng.choice((f"{bpm:.0f} bpm", f"about {round(bpm / 5) * 5} bpm"))
        self.metre = f"in {facts['metre']}" if facts["metre"] else ""
        if facts["metre"] == "3/4" and rng.random() < 0.4 and self.is_waltz:
            self.metre = "in waltz time"
        self.metre_tag = self.metre.removeprefix("in ")
        key = facts["key"] is not None and facts["mode"] is not None
        self.key = rng.choice(key_names(facts["key"], facts["mode"])) if key else ""
        self.mode = facts["mode"] or ""
        words = _DYNAMICS[facts["dynamics"]]
        self.dynamics = rng.choice(words) if words else ""

    def often(self, words: str, chance: float) -> str:
        return words if self.rng.random() < chance else ""

    @property
    def player(self) -> str:
        """`a flute`, `strings`."""
        return self.instrument if self.instrument in _PLURAL else article(self.instrument)


def article(words: str) -> str:
    """`words` after `a` or `an`."""
    return f"{'an' if words[0] in 'aeioAEIO' else 'a'} {words}"


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _commas(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _sentence(w: _Words) -> str:
    """`A slow hymn on a church organ in G minor`."""
    key = f"in {w.key}" if w.key and w.rng.random() < 0.85 else ""
    metre = w.often(w.metre, 0.4)
    dynamics = w.often(w.dynamics, 0.7)
    lead = _commas(dynamics, w.tempo) if w.rng.random() < 0.5 else _join(dynamics, w.tempo)
    tail = w.rng.choice(("", "", f" at {w.bpm}", f", {w.bpm}"))
    on = w.rng.choice(("on", "played on", "played by"))
    if w.name == "choir":
        on = w.rng.choice(("sung by", "for"))
    elif w.name == "strings":
        on = w.rng.choice(("played by", "for"))
    form = w.rng.randrange(3)
    if form == 0:
        text = _join(article(_join(lead, w.kind)), metre, on, w.player, key)
    elif form == 1:
        text = _join(article(_join(lead, w.kind)), key, metre, on, w.player)
    else:
        solo = "" if w.is_chorale else w.often("solo", 0.6)
        verb = "singing" if w.name == "choir" else "playing"
        who = _join(solo, w.instrument)
        who = who if w.instrument in _PLURAL or solo else article(who)
        text = _join(who, verb, article(_join(lead, w.kind)), metre, key)
    text += tail
    return _capital(text) + "." if w.rng.random() < 0.4 else text


def _phrase(w: _Words) -> str:
    """`gentle piano chorale, quiet, about 70 bpm`."""
    solo = "" if w.is_chorale else w.often("solo ", 0.3)
    head = _join(w.often(w.dynamics, 0.5), w.often(w.tempo, 0.7), solo + w.adjective, w.kind)
    extras = [w.often(w.key, 0.6), w.often(w.metre, 0.3), w.often(w.bpm, 0.4)]
    w.rng.shuffle(extras)
    return _commas(head, *extras)


def _tags(w: _Words) -> str:
    """`reel, violin, fast, A major`."""
    tags = [
        w.often(w.kind, 0.85),
        w.instrument,
        w.often(w.tempo, 0.8),
        w.often(w.key, 0.6),
        w.often(w.dynamics, 0.7),
        w.often(w.metre_tag, 0.3),
        w.often(w.bpm, 0.3),
    ]
    w.rng.shuffle(tags)
    return _commas(*tags)


def _partial(w: _Words) -> str:
    """Two or three facts; in half of these captions the instrument is not among them."""
    music = w.rng.choice((w.kind, w.kind, "church music" if w.is_chorale else "music"))
    if w.rng.random() < 0.5:
        key = w.often(f"in {w.key}" if w.key else "", 0.6)
        dynamics = w.often(w.dynamics, 0.4)
        return _join(dynamics, w.tempo, music, key)
    form = w.rng.randrange(4)
    if form == 0:
        return _join(w.adjective, music) if music.endswith("music") else w.instrument
    if form == 1:
        return _join(w.tempo, w.adjective, music)
    if form == 2:
        if w.key:
            return _join(w.dynamics, w.instrument, f"in {w.key}")
        return _join(w.dynamics, w.adjective, music)
    if w.mode in ("major", "minor"):
        return f"{w.instrument} in a {w.mode} key"
    return _join(w.adjective, w.kind)
