"""The shapes of captions: sentences, phrases and lists. Each says every fact that its words hold."""

from collections.abc import Sequence

from musiclm_engine.data.caption_draft import Words
from musiclm_engine.data.caption_words import (
    DYNAMIC_ADJECTIVES,
    PLURAL_PLAYERS,
    tempo_words,
)

# Of a noun of two words, first words that go before the instrument's.
_BEFORE_ADJUNCT = ("traditional", "old", "Irish", "Scottish", "four-part", "baroque", "sacred")
_VOLUMES = {"soft": "low", "medium": "medium", "loud": "high"}


def sentence(w: Words) -> str:
    """`A slow hymn on a church organ in G minor`."""
    thing, adverb, phrases = w.arrange()
    opening = w.rng.choice(("",) * 5 + ("this is", "here is", "listen to"))
    cut = w.rng.randrange(2)  # how many phrases go before the player
    text = _join(opening, thing, *phrases[:cut], _by(w, adverb), _list(w, phrases[cut:]))
    return _finish(w, text, full=bool(opening))


def active(w: Words) -> str:
    """`A flute plays a lively jig in D major, at 120 bpm.`"""
    thing, adverb, phrases = w.arrange()
    if not w.player:
        return _finish(w, _join(thing, _by(w, adverb), _list(w, phrases)))
    is_full = w.rng.random() < 0.67
    text = _join(_plays(w, is_full), thing, adverb, _list(w, phrases))
    return _finish(w, text, full=is_full)


def two_sentences(w: Words) -> str:
    """`A slow hymn on an organ. It is in G minor, at 70 bpm.`"""
    thing, adverb, phrases = w.arrange()
    if w.player and w.rng.random() < 0.4:
        first = _join(_plays(w, True), thing, adverb)
    else:
        first = _join(thing, _by(w, adverb))
    if not phrases:
        return _capital(first) + "."
    begin = w.rng.choice(("", "it is ", "the music is ", "this one is "))
    second = begin + _list(w, phrases) if begin else ", ".join(phrases)
    return f"{_capital(first)}. {_capital(second)}."


def turned(w: Words) -> str:
    """`In G minor, at 70 bpm: a slow hymn on a church organ`."""
    thing, adverb, phrases = w.arrange()
    before = ", ".join(phrases) + w.rng.choice((",", ":")) if phrases else ""
    return _finish(w, _join(before, thing, _by(w, adverb)))


def phrase(w: Words) -> str:
    """`gentle piano chorale, about 70 bpm`."""
    tags = w.tags()
    words = {w.mood, *DYNAMIC_ADJECTIVES.get(w.dynamics, ()), *tempo_words(w.facts["tempo_bpm"])}
    before = [tag for tag in tags if tag and tag in words and w.rng.random() < 0.75]
    if w.key in tags and w.rng.random() < 0.3:
        before.append(w.key)
    alone = w.player and not w.is_chorale and w.rng.random() < 0.2
    noun = w.noun.removesuffix(" of music") if w.adjunct else w.noun
    first, _, rest = noun.partition(" ")
    if first in _BEFORE_ADJUNCT and w.adjunct:  # a traditional flute tune
        before.append(first)
        noun = rest
    head = _join(*before, "solo" if alone else "", w.adjunct, noun)
    return _capital_sometimes(w, ", ".join([head, *(tag for tag in tags if tag not in before)]))


def tags(w: Words) -> str:
    """`reel, violin, fast, A major`."""
    tags = [*w.tags(), *([w.player] if w.player else [])]
    if "kind" in w.stated or not tags:
        tags.append(w.noun)
    w.rng.shuffle(tags)
    between = [", ", ", ", ", ", "; "]
    if not any(tag.startswith("in ") for tag in tags):  # not "in three voices"
        between.append(" ")
    return w.rng.choice(between).join(tags)


def labels(w: Words) -> str:
    """`instrument: flute, key: D major, tempo: 120 bpm, jig`."""
    labels = [
        f"instrument: {w.player}" if w.player else "",
        f"key: {w.key}" if w.key else f"mode: {w.mode}" if w.mode else "",
        w.rng.choice(("tempo: {} bpm", "tempo: {}", "bpm: {}")).format(w.about + w.bpm)
        if w.bpm
        else "",
        f"time signature: {w.metre}" if "/" in w.metre else w.metre_tag(),
        f"mood: {w.mood}" if w.mood else "",
    ]
    if w.dynamics:
        labels.append(f"volume: {_VOLUMES[w.dynamics]}")
    if "tempo_word" in w.stated:
        labels.append(w.rng.choice(tempo_words(w.facts["tempo_bpm"])))
    if "kind" in w.stated:
        labels.append(w.noun)
    labels = [label for label in labels if label]
    w.rng.shuffle(labels)
    return w.rng.choice((", ", "; ")).join(labels)


def _plays(w: Words, is_full: bool) -> str:
    """`a flute plays`, `voices singing`."""
    who = w.who
    ending = "ing" if not is_full else "" if who in PLURAL_PLAYERS else "s"
    return f"{who} {w.verb}{ending}"


def _by(w: Words, adverb: str) -> str:
    """`played softly on a flute`, `for strings`."""
    if not w.player:
        return _join(w.done, adverb) if adverb else ""
    if adverb:
        return f"{w.done} {adverb} {'by' if w.is_group else 'on'} {w.who}"
    ways = [f"{w.done} by", "performed by", "for"]
    if not w.is_group:
        ways += ["on", f"{w.done} on", "performed on"]
    return f"{w.rng.choice(ways)} {w.who}"


def _list(w: Words, phrases: Sequence[str]) -> str:
    """`in G minor, in 3/4 and at 70 bpm`."""
    if len(phrases) < 2:
        return "".join(phrases)
    *most, last = phrases
    return ", ".join(most) + w.rng.choice((", ", " and ", " ")) + last


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _capital_sometimes(w: Words, words: str) -> str:
    return _capital(words) if w.rng.random() < 0.3 else words


def _finish(w: Words, text: str, full: bool = False) -> str:
    """With a full stop after a sentence, after a phrase sometimes."""
    at = w.rng.random()
    if at < (0.7 if full else 0.3):
        return _capital(text) + "."
    return _capital(text) if at < 0.8 else text
