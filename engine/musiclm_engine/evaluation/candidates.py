"""The clips that a model makes of captions, kept on disk to be judged and heard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from musiclm_engine.audio import save_audio
from musiclm_engine.checkpoint import read_json, write_json
from musiclm_engine.data.manifest import Clip
from musiclm_engine.evaluation.bench import Bench

PROMPTS_PER_BATCH = 8  # which share their seed; the next batch has the next one
NUM_CANDIDATES = 4


@dataclass(frozen=True)
class Candidates:
    """Of one caption, best first.

    Attributes:
        files: of audio.
        similarity: of each with the caption, by MuLaN.
        semantic: [candidates, S] tokens.
    """

    files: list[Path]
    similarity: list[float]
    semantic: np.ndarray


def make_candidates(
    bench: Bench, clips: Sequence[Clip], own: Sequence[int], *, seed: int
) -> list[Candidates]:
    """Generate from the first captions of clips, at the model's own settings, what is not there yet.

    A caption's candidates depend on the model, the caption, its clip's length and the seed of its
    place in `clips`; not on which others are generated with it.

    Args:
        bench: with the model.
        clips: whose captions to take.
        own: places in `clips` of those to generate now.
        seed: of the first batch.

    Returns:
        of each of `own` its candidates.
    """
    stems = {
        place: bench.work.stem(
            "candidates",
            bench.model_sha256,
            seed + place // PROMPTS_PER_BATCH,
            NUM_CANDIDATES,
            clips[place].seconds,
            clips[place].captions[0],
        )
        for place in own
    }
    missing = [place for place in own if not _record(stems[place]).exists()]
    done = len(own) - len(missing)
    bench.progress("generated", done, len(own))
    batches: dict[tuple[int, float], list[int]] = {}
    for place in missing:
        batches.setdefault((place // PROMPTS_PER_BATCH, clips[place].seconds), []).append(place)
    for (number, seconds), batch in batches.items():
        result = bench.model.generate(
            [clips[place].captions[0] for place in batch],
            seconds=seconds,
            num_samples=NUM_CANDIDATES,
            seed=seed + number,
        )
        for row, place in enumerate(batch):
            for n, audio in enumerate(result.audio[row], start=1):
                save_audio(_audio(stems[place], n), audio, result.sample_rate)
            record = {
                "caption": clips[place].captions[0],
                "similarity": result.scores[row].tolist(),
                "semantic": result.tokens["semantic"][row].tolist(),
            }
            write_json(_record(stems[place]), record)  # last: now all of the caption is there
        done += len(batch)
        bench.progress("generated", done, len(own))
    return [_read(stems[place]) for place in own]


def _read(stem: Path) -> Candidates:
    record = read_json(_record(stem))
    files = [_audio(stem, n) for n in range(1, NUM_CANDIDATES + 1)]
    return Candidates(files, record["similarity"], np.array(record["semantic"]))


def _record(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _audio(stem: Path, number: int) -> Path:
    return stem.with_name(f"{stem.name}-{number}.flac")
