"""One draw of words for the facts that a caption is to state."""

import random
from collections.abc import Sequence

from musiclm_engine.data.caption_words import (
    DYNAMIC_ADJECTIVES,
    DYNAMIC_ADVERBS,
    DYNAMIC_PHRASES,
    FAMILY_ADJUNCTS,
    PLURAL_PLAYERS,
    Facts,
    article,
    family_players,
    general_names,
    key_names,
    kind_names,
    metre_names,
    mood_words,
    round_tempo,
    tempo_adverbs,
    tempo_phrases,
    tempo_words,
)
from musiclm_engine.data.instruments import INSTRUMENTS

_ROUNDED_CHANCE = 0.3
# Before a noun some instruments change their name: a choral hymn, not a voices hymn. A chorale is never
# called choral besides.
_BEFORE_NOUN = {
    "choir": ("choral", "choir"),
    "strings": ("string orchestra", "string ensemble", "strings"),
}


class Words:
    """Words for the facts stated, one draw; empty where a fact is left unsaid.

    `exact`: a tempo is not rounded.
    """

    def __init__(self, facts: Facts, stated: set[str], rng: random.Random, exact: bool) -> None:
        self.facts, self.stated, self.rng = facts, stated, rng
        self.verb, self.done = "play", "played"
        if facts["instrument"] == "choir":  # "sung" would say who plays
            told = stated & {"instrument", "family"}
            self.verb, self.done = ("sing", "sung") if told else ("perform", "performed")
        self.is_chorale = facts["kind"] == "chorale"
        self.noun = rng.choice(kind_names(facts) if "kind" in stated else general_names(facts))
        self.player = self.adjunct = ""
        if "instrument" in stated:
            self.player = rng.choice(INSTRUMENTS[facts["instrument"]].words)
            names = _BEFORE_NOUN.get(facts["instrument"], (self.player,))
            self.adjunct = rng.choice([n for n in names if not self.noun.endswith(f"{n}e")])
        elif "family" in stated:
            family = INSTRUMENTS[facts["instrument"]].family
            self.player = rng.choice(family_players(facts["instrument"], family))
            self.adjunct = FAMILY_ADJUNCTS[family]
        self.key = ""
        if "key" in stated:
            usual, *others = key_names(facts["key"], facts["mode"])
            self.key = rng.choice((usual, usual, *others))
        self.mode = facts["mode"] if "mode" in stated else ""
        self.metre = (
            rng.choice(metre_names(facts["metre"], facts["kind"])) if "metre" in stated else ""
        )
        self.mood = rng.choice(mood_words(facts)) if "mood" in stated else ""
        self.dynamics = facts["dynamics"] if "dynamics" in stated else ""
        self.bpm = self.about = ""
        if "tempo_bpm" in stated:
            exact = exact or rng.random() > _ROUNDED_CHANCE
            rounded = None if exact else round_tempo(facts["tempo_bpm"])
            self.bpm = f"{rounded or facts['tempo_bpm']:.0f}"
            self.about = rng.choice(("about ", "around ", "roughly ")) if rounded else ""

    @property
    def is_group(self) -> bool:
        return self.player in PLURAL_PLAYERS or self.facts["instrument"] in ("strings", "choir")

    @property
    def who(self) -> str:
        """`a flute`, `strings`, `a solo violin`."""
        if not self.player or self.player in PLURAL_PLAYERS:
            return self.player
        alone = self.rng.random() < 0.25 and not self.is_chorale
        return article(self.rng.choice(("solo ", "single ")) * alone + self.player)

    def bpm_phrase(self) -> str:
        n = self.about + self.bpm
        forms = [f"at {n} bpm", f"at {n} bpm", f"at {n} beats per minute", f"at {n} beats a minute"]
        if not self.about:
            forms += [f"at a tempo of {n} bpm", f"at a tempo of {n}", f"at tempo {n}"]
        return self.rng.choice(forms)

    def bpm_tag(self) -> str:
        n = self.about + self.bpm
        forms = [f"{n} bpm", f"{n} bpm", f"{n} BPM", f"{n}bpm", f"{n} beats per minute"]
        return self.rng.choice(forms if self.about else [*forms, f"tempo {n}"])

    def key_phrase(self) -> str:
        if self.mode:
            forms = _mode_phrases(self.mode)
        else:
            forms = [f"in {self.key}"] * 3 + [f"in the key of {self.key}"]
        return self.rng.choice(forms)

    def key_tag(self) -> str:
        if self.mode:
            plain = (self.mode, f"{self.mode} key", f"{self.mode} mode")
            return self.rng.choice(plain if self.mode in ("major", "minor") else plain[::2])
        return self.rng.choice((self.key, self.key, f"key of {self.key}"))

    def metre_tag(self) -> str:
        """`3/4`, `triple time`, `in three`."""
        return f"in {self.metre}" if self.metre in ("two", "three", "four") else self.metre

    def arrange(self) -> tuple[str, str, list[str]]:
        """The thing (`a slow hymn`), an adverb or "", and phrases: together all but the player."""
        rng, bpm = self.rng, self.facts["tempo_bpm"]
        adjectives = [self.mood] if self.mood else []
        phrases: list[str] = []
        adverb = ""
        if self.dynamics:
            ways = [
                (DYNAMIC_ADJECTIVES[self.dynamics], 3),
                (DYNAMIC_ADVERBS[self.dynamics], 1),
                (DYNAMIC_PHRASES[self.dynamics], 1),
            ]
            adverb = self._place(ways, adjectives, phrases)
        if "tempo_word" in self.stated:
            ways = [
                (tempo_words(bpm), 4),
                (() if adverb else tempo_adverbs(bpm), 1),
                (tempo_phrases(bpm), 1),
            ]
            adverb = self._place(ways, adjectives, phrases) or adverb
        key_first = self.key and rng.random() < 0.15  # a slow G minor hymn
        if (self.key or self.mode) and not key_first:
            phrases.append(self.key_phrase())
        if self.metre:
            phrases.append(f"in {self.metre}")
        if self.bpm:
            phrases.append(self.bpm_phrase())
        rng.shuffle(phrases)
        rng.shuffle(adjectives)
        between = rng.choice((" ", ", ", " and ")) if len(adjectives) == 2 else ", "
        noun = f"{self.key} {self.noun}" if key_first else self.noun
        thing = f"{between.join(adjectives)} {noun}".lstrip()
        is_mass = self.noun.endswith("music") and " of " not in self.noun
        return thing if is_mass else article(thing), adverb, phrases

    def _place(
        self, ways: Sequence[tuple[Sequence[str], int]], adjectives: list[str], phrases: list[str]
    ) -> str:
        """Takes one word as adjective, adverb or phrase; an adverb is returned, the others kept."""
        way = self.rng.choices(range(3), [weight if words else 0 for words, weight in ways])[0]
        word = self.rng.choice(ways[way][0])
        if way == 1:
            return word
        (adjectives if way == 0 else phrases).append(word)
        return ""

    def tags(self) -> list[str]:
        """All but player and noun, as tags."""
        rng, bpm = self.rng, self.facts["tempo_bpm"]
        tags = [self.mood]
        if self.dynamics:
            words = DYNAMIC_ADJECTIVES[self.dynamics] or ("medium volume", "neither loud nor soft")
            tags.append(rng.choice(words))
        if "tempo_word" in self.stated:
            tags.append(rng.choice(tempo_words(bpm)))
        if self.key or self.mode:
            tags.append(self.key_tag())
        if self.metre:
            tags.append(self.metre_tag())
        if self.bpm:
            tags.append(self.bpm_tag())
        tags = [tag for tag in tags if tag]
        rng.shuffle(tags)
        return tags


def _mode_phrases(mode: str) -> list[str]:
    if mode in ("major", "minor"):
        return [f"in a {mode} key"]
    return [f"in the {mode} mode", f"in a {mode} mode"]
