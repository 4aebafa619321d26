"""Compares generated clips with the facts of their captions, between a floor and a ceiling.

The judges (see the modules beside this one) took no part in training. They err on real music too,
so each measure is given three times: on the generated clips, on true renderings (the ceiling) and
on the generated clips with their captions dealt out at random (the floor), whose spread is also the
permutation test of "the clips follow their captions".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from musiclm_engine.evaluation.instruments import (
    INSTRUMENT_TAGS,
    OTHER_NAMES,
    UNJUDGED_INSTRUMENTS,
    instrument_log_odds,
)
from musiclm_engine.evaluation.notes import (
    NoteActivity,
    NoteTranscriber,
    estimate_key,
    note_activity,
)
from musiclm_engine.evaluation.tagger import MusicTagger
from musiclm_engine.evaluation.tempo import estimate_tempo, tempo_agrees

PITCH_CLASSES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
ACCIDENTALS = {"": 0, "#": 1, "b": -1}
# The key judge knows two modes; a church mode counts as the one that shares its third.
MODES = {
    **dict.fromkeys(("major", "ionian", "lydian", "mixolydian"), "major"),
    **dict.fromkeys(("minor", "aeolian", "dorian", "phrygian", "locrian"), "minor"),
}

# A clip is audibly notes, rather than noise or silence, from these on. It is a low bar: all of 160
# true clips pass (the least have 0.77 and 1.1), white noise and clips cut in 20 or 80 ms pieces
# and shuffled all fail, but a smear of the right pitches (a clip with random phases) passes.
MIN_SOUNDING_SHARE = 0.5
MIN_NOTES_PER_SECOND = 0.5

PERMUTATIONS_PER_CHUNK = 256  # bounds the memory of the permutation test at 256 x clips indices

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class JudgedClip:
    """A clip and what its caption says of it.

    audio: mono float32 [samples] in [-1, 1]. facts: `instrument` (a name of `INSTRUMENT_TAGS`, or
    "church organ", which is not judged), `key` ("G", "Bb", "F#") with `mode` ("major", "dorian",
    ...), and `tempo_bpm`. A fact that is absent or None is not judged; other entries are ignored.
    """

    audio: np.ndarray
    sample_rate_hz: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What the judges hear in one clip, knowing nothing of its caption."""

    instrument_log_odds: Mapping[str, float]  # of every instrument in INSTRUMENT_TAGS
    key: tuple[int, str] | None  # tonic (0 is C), "major" or "minor"
    tempo_bpm: float | None
    activity: NoteActivity


class Judges:
    """The three networks and trackers, loaded once; call it with a clip for its `Judgement`.

    Raises ModuleNotFoundError, naming the install command, where one of their packages is missing.
    """

    def __init__(self) -> None:
        self._transcribe = NoteTranscriber()
        self._tag = MusicTagger()

    def __call__(self, clip: JudgedClip) -> Judgement:
        posteriors = self._transcribe(clip.audio, clip.sample_rate_hz)
        return Judgement(
            instrument_log_odds(self._tag(clip.audio, clip.sample_rate_hz)),
            estimate_key(posteriors.notes),
            estimate_tempo(clip.audio, clip.sample_rate_hz),
            note_activity(posteriors),
        )


def evaluate_clips(
    generated: Sequence[JudgedClip],
    truth: Sequence[JudgedClip],
    *,
    seed: int = 0,
    permutations: int = 10_000,
    judge: Callable[[JudgedClip], Judgement] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judges both lists and compares each clip with the facts of its caption.

    generated: clips made from captions, with those captions' facts. truth: renderings of which the
    facts hold; give it the same mixture of instruments, keys and tempi, for both lists are measured
    on their own. judge: stands in for `Judges()`. progress: called with (clips done, clips in all)
    after every clip. The result depends on the clips, `seed` and `permutations` alone.

    Returns what `json.dumps` takes: the sizes of the lists and, under "measures", for each measure
        generated      its value on `generated`, over the num_generated clips whose caption has the
                       fact; None where none has
        truth          its value on `truth`, over num_truth clips
        shuffled       its mean over random dealings of the captions among `generated`
        p_value        (1 + dealings that do at least as well) / (1 + dealings): one-sided
    The measures:
        instrument_score       log-odds of the captioned instrument, standardised over the clips
        instrument_accuracy    share of clips in which that instrument's are the highest
        key_exact              share of clips in the captioned key
        key_exact_or_relative  the same, the relative major or minor counting too
        tempo_accuracy1        share of clips within 4 % of the captioned tempo
        tempo_accuracy2        the same, with a factor of 2 or 3 forgiven
        audibly_notes          share of clips that pass `is_audibly_notes`; it has no floor
    Raises ValueError for an empty list or a fact that the judges do not know.
    """
    for name, clips in (("generated", generated), ("truth", truth)):
        if not clips:
            raise ValueError(f"{name} holds no clips")
        for clip in clips:
            _check_facts(clip.facts)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; got {permutations}")
    judge = judge or Judges()
    judgements = []
    total = len(generated) + len(truth)
    for clip in [*generated, *truth]:
        judgements.append(judge(clip))
        if progress is not None:
            progress(len(judgements), total)
    return compare_judgements(
        judgements[: len(generated)],
        [clip.facts for clip in generated],
        judgements[len(generated) :],
        [clip.facts for clip in truth],
        seed=seed,
        permutations=permutations,
    )


def compare_judgements(
    generated: Sequence[Judgement],
    generated_facts: Sequence[Mapping[str, Any]],
    truth: Sequence[Judgement],
    truth_facts: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    permutations: int = 10_000,
) -> dict[str, Any]:
    """The statistics of `evaluate_clips`, from judgements already made."""
    generated_agreement = agreement(generated, generated_facts)
    truth_agreement = agreement(truth, truth_facts)
    shuffled = _shuffled_means(generated_agreement, seed=seed, permutations=permutations)
    measures = {}
    for name, scores in generated_agreement.items():
        value, num_judged = _own_caption_mean(scores)
        truth_value, num_truth = _own_caption_mean(truth_agreement[name])
        means = shuffled[name]
        measures[name] = {
            "generated": value,
            "truth": truth_value,
            "shuffled": None if value is None else float(means.mean()),
            "p_value": None if value is None else permutation_p_value(value, means),
            "num_generated": num_judged,
            "num_truth": num_truth,
        }
    measures["audibly_notes"] = {
        "generated": float(np.mean([is_audibly_notes(j.activity) for j in generated])),
        "truth": float(np.mean([is_audibly_notes(j.activity) for j in truth])),
        "shuffled": None,
        "p_value": None,
        "num_generated": len(generated),
        "num_truth": len(truth),
    }
    return {
        "num_generated": len(generated),
        "num_truth": len(truth),
        "permutations": permutations,
        "seed": seed,
        "measures": measures,
    }


def agreement(
    judgements: Sequence[Judgement], facts: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """How well clip i fits caption j, by measure: [clips, captions], NaN where j lacks the fact."""
    if len(judgements) != len(facts):
        raise ValueError(f"{len(judgements)} judgements for {len(facts)} captions")
    scores = {
        name: np.full((len(judgements), len(facts)), np.nan)
        for name in (
            "instrument_score",
            "instrument_accuracy",
            "key_exact",
            "key_exact_or_relative",
            "tempo_accuracy1",
            "tempo_accuracy2",
        )
    }
    captioned = [_judged_instrument(caption) for caption in facts]
    instruments = [name for name in INSTRUMENT_TAGS if name in captioned]
    standardised = _standardised_log_odds(judgements, instruments)
    for j, caption in enumerate(facts):
        name = captioned[j]
        if name is not None:
            column = instruments.index(name)
            scores["instrument_score"][:, j] = standardised[:, column]
            scores["instrument_accuracy"][:, j] = standardised.argmax(1) == column
        key = caption_key(caption)
        if key is not None:
            relative = _relative_key(key)
            scores["key_exact"][:, j] = [clip.key == key for clip in judgements]
            scores["key_exact_or_relative"][:, j] = [
                clip.key in (key, relative) for clip in judgements
            ]
        tempo = caption.get("tempo_bpm")
        if tempo is not None:
            for measure, any_level in (("tempo_accuracy1", False), ("tempo_accuracy2", True)):
                scores[measure][:, j] = [
                    tempo_agrees(clip.tempo_bpm, float(tempo), any_metrical_level=any_level)
                    for clip in judgements
                ]
    return scores


def permutation_p_value(value: float, shuffled: np.ndarray) -> float:
    """(1 + #{shuffled >= value}) / (1 + #shuffled): never zero, at any number of dealings."""
    # The tolerance makes equal means, summed in another order, count as ties.
    return float((1 + np.count_nonzero(shuffled >= value - 1e-9)) / (1 + len(shuffled)))


def is_audibly_notes(activity: NoteActivity) -> bool:
    """Whether enough notes are found, and sound for enough of the clip, to call it playing."""
    return (
        activity.sounding_share >= MIN_SOUNDING_SHARE
        and activity.notes_per_second >= MIN_NOTES_PER_SECOND
    )


def caption_key(facts: Mapping[str, Any]) -> tuple[int, str] | None:
    """The (tonic, "major" or "minor") that a caption states; None without `key` or `mode`."""
    key, mode = facts.get("key"), facts.get("mode")
    if key is None or mode is None:
        return None
    if key[:1] not in PITCH_CLASSES or key[1:] not in ACCIDENTALS:
        raise ValueError(f"key must be a letter A-G with at most one # or b; got {key!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    return (PITCH_CLASSES[key[0]] + ACCIDENTALS[key[1:]]) % 12, MODES[mode]


def _check_facts(facts: Mapping[str, Any]) -> None:
    _judged_instrument(facts)
    caption_key(facts)
    tempo = facts.get("tempo_bpm")
    if tempo is not None and not tempo > 0:
        raise ValueError(f"tempo_bpm must be positive; got {tempo}")


def _judged_instrument(facts: Mapping[str, Any]) -> str | None:
    name: Any = facts.get("instrument")
    name = OTHER_NAMES.get(name, name)
    if name is None or name in UNJUDGED_INSTRUMENTS:
        return None
    if name not in INSTRUMENT_TAGS:
        known = ", ".join([*INSTRUMENT_TAGS, *OTHER_NAMES, *UNJUDGED_INSTRUMENTS])
        raise ValueError(f"instrument must be one of {known}; got {name!r}")
    return str(name)


def _relative_key(key: tuple[int, str]) -> tuple[int, str]:
    tonic, mode = key
    return ((tonic + 9) % 12, "minor") if mode == "major" else ((tonic + 3) % 12, "major")


def _standardised_log_odds(judgements: Sequence[Judgement], instruments: list[str]) -> np.ndarray:
    """Log-odds [clips, instruments], each column of mean 0 and deviation 1 over all clips.

    Tags differ in base rate and in how far they swing; standardised, they compare. A column without
    spread gives 0.
    """
    log_odds = np.array(
        [[clip.instrument_log_odds[name] for name in instruments] for clip in judgements]
    ).reshape(len(judgements), len(instruments))
    centred = log_odds - log_odds.mean(0)
    deviation = centred.std(0)
    return centred / np.where(deviation > 1e-9, deviation, np.inf)


def _own_caption_mean(scores: np.ndarray) -> tuple[float | None, int]:
    own = np.diag(scores)
    own = own[~np.isnan(own)]
    return (float(own.mean()) if len(own) else None), len(own)


def _shuffled_means(
    scores: Mapping[str, np.ndarray], *, seed: int, permutations: int
) -> dict[str, np.ndarray]:
    """The mean of each measure under each dealing of the captions; measures share the dealings."""
    generator = np.random.default_rng(seed)
    num_clips = len(next(iter(scores.values())))
    judged = {name: np.flatnonzero(~np.isnan(table[0])) for name, table in scores.items()}
    means: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for first in range(0, permutations, PERMUTATIONS_PER_CHUNK):
        num_dealings = min(PERMUTATIONS_PER_CHUNK, permutations - first)
        order = np.tile(np.arange(num_clips), (num_dealings, 1))
        clip_of_caption = generator.permuted(order, axis=1)
        for name, captions in judged.items():
            if len(captions):
                dealt = scores[name][clip_of_caption[:, captions], captions]
                means[name].append(dealt.mean(1))
    return {
        name: np.concatenate(chunks) if chunks else np.empty(0) for name, chunks in means.items()
    }
