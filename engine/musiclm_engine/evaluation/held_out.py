"""A model judged on pieces that no part of it was trained on.

Whatever takes time is kept in a folder under what it depends on: candidates under the model, seed and
caption, judgements under the audio that was judged. The same command therefore goes on where it was cut
short, and a model that has changed starts afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from musiclm_engine.data.manifest import Clip, load_manifest
from musiclm_engine.evaluation.agreement import check_facts, stated_facts
from musiclm_engine.evaluation.bench import Bench, Progress
from musiclm_engine.evaluation.candidates import (
    NUM_CANDIDATES,
    PROMPTS_PER_BATCH,
    make_candidates,
)
from musiclm_engine.evaluation.clip_tokens import clips_to_continue, semantic_tokens
from musiclm_engine.evaluation.codec_judgement import judge_codec
from musiclm_engine.evaluation.evaluate import compare_judgements
from musiclm_engine.evaluation.frechet import frechet_distance
from musiclm_engine.evaluation.judges import JUDGES_VERSION, Judgement, Judges
from musiclm_engine.evaluation.known_music import without_known
from musiclm_engine.evaluation.memorisation import (
    CONTINUED_SECONDS,
    PROMPT_SECONDS,
    judge_memorisation,
    share_found_anywhere,
)
from musiclm_engine.evaluation.work_folder import WorkFolder, file_sha256
from musiclm_engine.musiclm import MusicLM

CODEC_CLIPS = 48
USUAL_QUANTILE = 0.05  # of the best candidates' similarity: below it, `musiclm generate` doubts
CONTINUED_CLIPS = 200  # 19,900 pairs, so that a share of 1 in 10,000 can be told


def evaluate_held_out(
    model: MusicLM,
    manifest: Path,
    *,
    model_sha256: str,
    clips: int,
    seed: int,
    work: Path,
    part: tuple[int, int] = (1, 1),
    on_progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Generate from test captions as `musiclm generate` would, and judge what comes of it.

    Each caption is its clip's first. The ceiling is the same clips' own audio. What a caption does
    not state is not judged; where a manifest does not say what captions state, each is taken to state
    all of its clip's facts. Held-out clips whose music stands in training under another name
    (`without_known`) are left out.

    Args:
        model: to judge.
        manifest: with all three splits.
        model_sha256: `musiclm.fingerprint` of the model.
        clips: how many captions.
        seed: of their choice and of all that is drawn.
        work: folder of what is kept.
        part: (k, n) generates and judges the k-th of n parts of the captions, for processes side by
            side; the figures come from a call without it.
        on_progress: called with (what, done, of how many).

    Returns:
        None for a part. Otherwise what `json.dumps` takes: what `compare_judgements` gives, the
        "captions", "facts_are_stated", "num_known_left_out", "mulan_similarity" of first and of any candidate and what the
        first of 19 in 20 captions reach ("usual"), "frechet" (see `_frechet`), "codec"
        (`judge_codec`) and "memorisation" (see `_memorisation`).

    Raises:
        ValueError: fewer clips in the test split, none of other pieces beside those chosen, clips too
            short to be continued, a part that does not exist, facts that the judges do not know.
        ModuleNotFoundError: a judge's package is missing.
    """
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part is {part[0]}/{part[1]}, wanted k/n with k from 1 to n")
    judges = Judges()  # first, because a missing package should not cost the generation
    splits = {split: load_manifest(manifest, split) for split in ("train", "validation", "test")}
    test, validation = (
        without_known(splits[split], splits["train"]) for split in ("test", "validation")
    )
    if len(test) < clips:
        raise ValueError(
            f"clips is {clips}, {manifest} has {len(test)} in its test split of music that is not "
            "in training"
        )
    order = np.random.default_rng(seed).permutation(len(test))
    chosen = [test[index] for index in order[:clips]]
    pieces = {clip.piece for clip in chosen}
    others = [clip for clip in test + validation if clip.piece not in pieces]
    # What would end the evaluation after hours of generation is refused before.
    if not others:
        raise ValueError(
            f"{manifest} has no clips of other pieces to compare {clips} test clips with"
        )
    shortest = min(clip.seconds for some in splits.values() for clip in some)
    wanted = max(PROMPT_SECONDS) + CONTINUED_SECONDS
    if shortest < wanted:
        raise ValueError(f"{manifest} has clips of {shortest:g} s, wanted {wanted:g} s or more")
    facts_are_stated = any(any(clip.stated) for clip in test)
    facts = [
        stated_facts(clip.facts, clip.stated[0] if facts_are_stated else clip.facts)
        for clip in chosen
    ]
    for caption in facts:
        check_facts(caption)

    bench = Bench(
        model, model_sha256, judges, WorkFolder(work), on_progress or (lambda what, done, of: None)
    )
    batches = range(0, clips, PROMPTS_PER_BATCH)[part[0] - 1 :: part[1]]
    own = [i for first in batches for i in range(first, min(first + PROMPTS_PER_BATCH, clips))]
    made = make_candidates(bench, chosen, own, seed=seed)
    judged = bench.judge("judged", [path for caption in made for path in caption.files])
    truth = bench.judge("true clips", [chosen[i].audio for i in own])
    if part[1] > 1:
        return None

    candidates = [judged[i : i + NUM_CANDIDATES] for i in range(0, len(judged), NUM_CANDIDATES)]
    similarity = np.array([caption.similarity for caption in made])
    return {
        **compare_judgements(candidates, truth, facts, seed=seed),
        "captions": [clip.captions[0] for clip in chosen],
        "facts_are_stated": facts_are_stated,
        "num_known_left_out": sum(len(splits[split]) for split in ("test", "validation"))
        - len(test + validation),
        "mulan_similarity": {
            "best": float(similarity[:, 0].mean()),
            "any": float(similarity.mean()),
            "usual": float(np.quantile(similarity[:, 0], USUAL_QUANTILE)),
        },
        "frechet": _frechet(bench, [own[0] for own in candidates], truth, chosen, others),
        "codec": _codec(bench, chosen[:CODEC_CLIPS]),
        "memorisation": _memorisation(
            bench,
            splits["train"],
            validation + test,
            [row for caption in made for row in caption.semantic],
            manifest_sha256=file_sha256(manifest),
            seed=seed,
        ),
    }


def _frechet(
    bench: Bench,
    best: Sequence[Judgement],
    truth: Sequence[Judgement],
    clips: Sequence[Clip],
    others: Sequence[Clip],
) -> dict[str, Any]:
    """Distances of three heaps of equally many clips to one of real, held-out clips of other pieces.

    Returns:
        "generated" of the first candidates; "codec" of the captions' own clips, through the codec at
        the levels that generation uses; "real" of those clips as they are; "ratio", generated over
        codec; and the sizes "num_clips", "num_others", "num_patches", "num_patches_of_others".
    """
    reference = bench.embed("other clips", others)
    rebuilt = bench.embed("rebuilt", clips, levels=bench.codec_levels)
    generated = np.concatenate([clip.embedding for clip in best])
    distances = {
        "generated": frechet_distance(generated, reference),
        "codec": frechet_distance(rebuilt, reference),
        "real": frechet_distance(np.concatenate([clip.embedding for clip in truth]), reference),
    }
    return {
        **distances,
        "ratio": distances["generated"] / distances["codec"],
        "codec_levels": bench.codec_levels,
        "num_clips": len(clips),
        "num_others": len(others),
        "num_patches": len(generated),
        "num_patches_of_others": len(reference),
    }


def _codec(bench: Bench, clips: Sequence[Clip]) -> dict[str, Any]:
    """`judge_codec` at every level there is."""
    codec = bench.model.audiolm.codec
    return bench.work.kept(
        "codec",
        JUDGES_VERSION,
        bench.model_sha256,
        *(file_sha256(clip.audio) for clip in clips),
        compute=lambda: judge_codec(
            codec,
            clips,
            range(1, codec.num_quantizers + 1),
            judges=bench.judges,
            on_progress=partial(bench.progress, "codec"),
        ),
    )


def _memorisation(
    bench: Bench,
    trained: Sequence[Clip],
    held_out: Sequence[Clip],
    generated: Sequence[np.ndarray],
    *,
    manifest_sha256: str,
    seed: int,
) -> dict[str, Any]:
    """`judge_memorisation`, and of the generated clips' first seconds "found_anywhere", the share
    that stand as they are in any of the training clips."""
    tokens = semantic_tokens(bench, trained, manifest_sha256=manifest_sha256)
    figures = bench.work.kept(
        "memorisation",
        bench.model_sha256,
        manifest_sha256,
        CONTINUED_CLIPS,
        seed,
        compute=lambda: judge_memorisation(
            bench.model,
            clips_to_continue(bench, trained, count=CONTINUED_CLIPS, seed=seed),
            clips_to_continue(bench, held_out, count=CONTINUED_CLIPS, seed=seed),
            seed=seed,
        ),
    )
    tokenizer = bench.model.tokenizer
    length = round(CONTINUED_SECONDS * tokenizer.sample_rate_hz / tokenizer.hop_length)
    return {
        **figures,
        "found_anywhere": share_found_anywhere([row[:length] for row in generated], tokens.numpy()),
        "num_generated": len(generated),
        "num_searched": len(tokens),
    }
