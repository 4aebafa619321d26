"""Writes the figures of an evaluation as Markdown, for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = {
    "instrument": "instrument heard first (musicnn)",
    "key_exact": "key exact (basic-pitch)",
    "key_exact_or_relative": "key exact or relative (basic-pitch)",
    "mode": "major or minor (basic-pitch)",
    "tempo_accuracy1": "tempo within 4 % (librosa)",
    "tempo_accuracy2": "tempo within 4 %, any metrical level (librosa)",
    "combined": "all that is stated: mean of instrument, key or relative, tempo at any level",
    "audibly_notes": "audibly notes (basic-pitch)",
}


def markdown_table(figures: Mapping[str, Any]) -> str:
    """All of what `evaluate_held_out` gives: two tables and paragraphs; ends in a newline."""
    parts = [
        attributes_table(figures, facts_are_stated=figures["facts_are_stated"]),
        codec_table(figures["codec"]),
        _frechet(figures["frechet"]),
        _memorisation(figures["memorisation"]),
        f"Left out: {figures['num_known_left_out']} held-out clips that training knows by other names.\n",
    ]
    return "\n".join(parts)


def attributes_table(figures: Mapping[str, Any], *, facts_are_stated: bool) -> str:
    """What `compare_judgements` gives, one row a measure."""
    count = figures["num_candidates"]
    columns = (
        "true renderings",
        f"best of {count}",
        f"any of {count}",
        "captions shuffled",
        "best / true",
        "the same above chance",
        "p: captions followed",
        "p: best above any",
        "captions",
    )
    lines = [f"| judged | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, title in ROWS.items():
        measure = figures["measures"][name]
        cells = [
            *(_percent(measure[arm]) for arm in ("truth", "best", "any", "shuffled")),
            *(_percent(measure[share]) for share in ("share_of_truth", "above_chance")),
            *(_number(measure[p], ".2g") for p in ("p_followed", "p_best")),
            str(measure["num_judged"]),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if facts_are_stated:
        asked = "A caption is judged only on what it states."
    else:
        asked = "The manifest does not say what captions state: each is judged on all facts of its clip."
    below = (
        f"{figures['num_captions']} captions, {count} candidates each; best: by MuLaN. {asked} "
        "Above chance: what the clips have above the same clips shuffled, in both. "
        f"p: one-sided permutation tests, {figures['permutations']:,} dealings of the captions, and as "
        "many random choices of a candidate."
    )
    return "\n".join([*lines, "", below]) + "\n"


def codec_table(figures: Mapping[str, Any]) -> str:
    """What `judge_codec` gives, one row a number of levels."""
    lines = [
        "| codec levels | kbit/s | note F1 (basic-pitch) | tag correlation (musicnn) |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in figures["levels"]:
        cells = (
            str(row["levels"]),
            _number(row["kbit_per_second"], ".2f"),
            _number(row["note_f1"], ".2f"),
            _number(row["tag_correlation"], ".2f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    below = (
        f"{figures['num_clips']} held-out clips, {figures['num_notes']:,} notes. Tag correlation of one "
        f"clip with another: {figures['tag_correlation_of_others']:.2f}."
    )
    return "\n".join([*lines, "", below]) + "\n"


def _frechet(figures: Mapping[str, Any]) -> str:
    return (
        f"Fréchet distance to {figures['num_others']:,} real clips of other pieces "
        f"({figures['num_patches_of_others']:,} patches of 3 s, musicnn's embedding): generated "
        f"{figures['generated']:.1f}, the captions' own clips {figures['real']:.1f}, and through "
        f"{figures['codec_levels']} levels of the codec {figures['codec']:.1f}; generated / codec "
        f"{figures['ratio']:.1f}. {figures['num_clips']:,} clips, {figures['num_patches']:,} patches "
        "each.\n"
    )


def _memorisation(figures: Mapping[str, Any]) -> str:
    said = []
    for row in figures["rows"]:
        drawn = "greedily" if row["is_greedy"] else "sampled"
        exact, near = (
            f"{_share(row[f'trained_{kind}'])} (held out {_share(row[f'held_out_{kind}'])})"
            for kind in ("exact", "approximate")
        )
        said.append(f"{row['prompt_seconds']:g} s, {drawn}: exact {exact}, approximate {near}")
    return (
        f"Memorisation, semantic stage: {figures['num_trained']} training clips (and "
        f"{figures['num_held_out']} held out, which it cannot know) continued for "
        f"{figures['continued_seconds']:g} s after a prompt of {'; '.join(said)}. Of the first "
        f"{figures['continued_seconds']:g} s of {figures['num_generated']:,} clips made from text, "
        f"{_share(figures['found_anywhere'])} stand anywhere in {figures['num_searched']:,} training "
        "clips.\n"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
