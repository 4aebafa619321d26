"""Which instrument is heard: the tagger's log-odds of the tags that stand for each."""

from __future__ import annotations

from musiclm_engine.evaluation.tagger import Tagging

# The log-odds of an instrument are the mean over its tags. Beside each its AUC, one against the
# rest, on 160 clips of the corpus's training split, 20 of each instrument. Other tags part the
# strings better there ("voice": 0.97), but not because they mean them.
INSTRUMENT_TAGS: dict[str, tuple[str, ...]] = {
    "piano": ("piano",),  # 0.99
    "harpsichord": ("harpsichord",),  # 0.93
    "strings": ("strings",),  # 0.84; with "violin" or "cello" 0.79 to 0.81
    "choir": ("choir", "choral"),  # 1.00
    "flute": ("flute",),  # 1.00
    "violin": ("violin",),  # 0.97
    "guitar": ("guitar",),  # 1.00
}
OTHER_NAMES = {"string ensemble": "strings", "nylon guitar": "guitar"}
UNJUDGED_INSTRUMENTS = ("church organ",)  # none of the 50 tags is an organ


def instrument_log_odds(tagging: Tagging) -> dict[str, float]:
    """The log-odds of each of `INSTRUMENT_TAGS`; they compare across clips, not instruments."""
    return {
        instrument: sum(tagging.log_odds(tag) for tag in tags) / len(tags)
        for instrument, tags in INSTRUMENT_TAGS.items()
    }
