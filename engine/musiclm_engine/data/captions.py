"""Captions for a clip, from its facts and nothing else.

Facts are `instrument`, `kind`, `tempo_bpm`, `metre`, `key`, `mode`, `dynamics` and, where there is one,
`origin`. Which facts a caption states is drawn first, then the words, then the shape; what is None is
never said. What makes a word true is in `caption_words`.
"""

import random
from typing import NamedTuple

from musiclm_engine.data import caption_shapes as shapes
from musiclm_engine.data.caption_draft import Words
from musiclm_engine.data.caption_words import Facts, mood_words

NUM_CAPTIONS = 8

# The chance that a caption states a fact; the first caption and the short one have their own. Over the
# captions of a clip half state the tempo as a number, six in ten the key, nine in ten who plays.
_CHANCES = {
    "kind": 0.65,
    "tempo_bpm": 0.46,
    "tempo_word": 0.4,
    "metre": 0.25,
    "dynamics": 0.35,
    "mood": 0.4,
}
_KEY_CHANCE, _MODE_CHANCE = 0.62, 0.16
_INSTRUMENT_CHANCE, _FAMILY_CHANCE = 0.78, 0.14
_FIRST_EXTRAS = {"tempo_word": 0.4, "metre": 0.25, "dynamics": 0.35, "mood": 0.35}
_SHORT_WEIGHTS = {
    "instrument": 6,
    "family": 1,
    "kind": 2,
    "tempo_bpm": 1.5,
    "tempo_word": 1.5,
    "key": 1.5,
    "mode": 0.5,
    "metre": 0.5,
    "dynamics": 0.5,
    "mood": 2,
}
_ALTERNATIVES = (("instrument", "family"), ("key", "mode"))


class Caption(NamedTuple):
    text: str
    stated: frozenset[str]
    """The facts it states: names out of `manifest.STATABLE`."""


def write_captions(facts: Facts, rng: random.Random) -> tuple[Caption, ...]:
    """NUM_CAPTIONS captions, no two alike but for capitals, from full sentences to single words.

    The first states instrument, kind, key (where known) and the tempo as an exact number; the last is
    of one or two facts.
    """
    captions: dict[str, Caption] = {}
    while len(captions) < NUM_CAPTIONS:
        number = len(captions)
        if number == 0:
            caption = _write(facts, _first_facts(facts, rng), rng, exact=True)
        elif number == NUM_CAPTIONS - 1:
            caption = _write(facts, _few_facts(facts, rng), rng, short=True)
        else:
            caption = _write(facts, _some_facts(facts, rng), rng)
        captions.setdefault(caption.text.lower().rstrip("."), caption)
    return tuple(captions.values())


# Which facts


def _sayable(facts: Facts) -> set[str]:
    names = {"instrument", "family", "kind", "tempo_bpm", "tempo_word", "dynamics"}
    names |= {name for name in ("metre", "mode") if facts[name] is not None}
    if facts["key"] is not None and facts["mode"] is not None:
        names.add("key")
    if mood_words(facts):
        names.add("mood")
    return names


def _first_facts(facts: Facts, rng: random.Random) -> set[str]:
    stated = {"instrument", "kind", "key", "tempo_bpm"} | _draw(_FIRST_EXTRAS, rng)
    return stated & _sayable(facts)


def _some_facts(facts: Facts, rng: random.Random) -> set[str]:
    while True:
        stated = _draw(_CHANCES, rng)
        stated |= _either("instrument", _INSTRUMENT_CHANCE, "family", _FAMILY_CHANCE, rng)
        stated |= _either("key", _KEY_CHANCE, "mode", _MODE_CHANCE, rng)
        stated &= _sayable(facts)
        if len(stated) > 1:
            return stated


def _few_facts(facts: Facts, rng: random.Random) -> set[str]:
    names = [name for name in _SHORT_WEIGHTS if name in _sayable(facts)]
    stated = set(rng.choices(names, [_SHORT_WEIGHTS[name] for name in names], k=2))
    for better, other in _ALTERNATIVES:
        if better in stated:
            stated.discard(other)
    return stated


def _draw(chances: dict[str, float], rng: random.Random) -> set[str]:
    return {name for name, chance in chances.items() if rng.random() < chance}


def _either(name: str, chance: float, other: str, chance_other: float, rng: random.Random) -> set:
    at = rng.random()
    return {name} if at < chance else {other} if at < chance + chance_other else set()


# How

_LONG = (
    *((shapes.sentence, 5), (shapes.active, 4), (shapes.two_sentences, 3), (shapes.turned, 1)),
    *((shapes.phrase, 6), (shapes.tags, 4), (shapes.labels, 1.5)),
)
_PLAIN = ((shapes.sentence, 3), (shapes.active, 1), (shapes.phrase, 3), (shapes.tags, 1))
_SHORT = ((shapes.tags, 1), (shapes.phrase, 1))


def _write(
    facts: Facts, stated: set[str], rng: random.Random, exact: bool = False, short: bool = False
) -> Caption:
    choices = _SHORT if short else _LONG if len(stated) > 2 else _PLAIN
    (shape,) = rng.choices([shape for shape, _ in choices], [weight for _, weight in choices])
    return Caption(shape(Words(facts, stated, rng, exact)), frozenset(stated))
