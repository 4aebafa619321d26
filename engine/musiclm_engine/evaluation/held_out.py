"""A model judged on captions of pieces that no part of it was trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from musiclm_engine.audio import load_audio
from musiclm_engine.data.manifest import load_manifest
from musiclm_engine.evaluation.evaluate import JudgedClip, Judges, evaluate_clips
from musiclm_engine.musiclm import MusicLM

PROMPTS_PER_BATCH = 8
CANDIDATES = 4

Progress = Callable[[str, int, int], None]


def evaluate_held_out(
    model: MusicLM,
    manifest: Path,
    *,
    clips: int,
    seed: int,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Generate from test captions as `musiclm generate` would, and judge the best candidates.

    Each caption is its clip's first, which tells most. The ceiling is the same clips' own audio.

    Args:
        model: to judge.
        manifest: with a test split.
        clips: how many captions.
        seed: of their choice and of generation.

    Returns:
        see `evaluate_clips`; plus the captions and "mulan_similarity" of prompt and audio.
    """
    judges = Judges()  # first, because a missing package should not cost the generation
    held_out = load_manifest(manifest, "test")
    if len(held_out) < clips:
        raise ValueError(f"clips is {clips}, {manifest} has {len(held_out)} in its test split")
    order = np.random.default_rng(seed).permutation(len(held_out))[:clips]
    chosen = [held_out[index] for index in order]
    prompts = [clip.captions[0] for clip in chosen]

    generated, similarity = [], []
    for start in range(0, clips, PROMPTS_PER_BATCH):
        some = prompts[start : start + PROMPTS_PER_BATCH]
        result = model.generate(
            some, seconds=chosen[0].seconds, num_samples=CANDIDATES, seed=seed + start
        )
        similarity += result.scores[:, 0].tolist()
        for own, clip in zip(result.audio, chosen[start:], strict=False):
            generated.append(JudgedClip(own[0].cpu().numpy(), result.sample_rate, clip.facts))
        if on_progress is not None:
            on_progress("generated", len(generated), clips)
    truth = [
        JudgedClip(load_audio(clip.audio, model.sample_rate).numpy(), model.sample_rate, clip.facts)
        for clip in chosen
    ]
    figures = evaluate_clips(
        generated,
        truth,
        seed=seed,
        judge=judges,
        progress=None
        if on_progress is None
        else lambda done, total: on_progress("judged", done, total),
    )
    return {
        **figures,
        "captions": prompts,
        "mulan_similarity": float(np.mean(similarity)),
    }
