"""Writes the result of `evaluate_clips` as a Markdown table, for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = {
    "instrument_score": "captioned instrument, standardised log-odds (musicnn)",
    "instrument_accuracy": "captioned instrument heard first (musicnn)",
    "key_exact": "key exact (basic-pitch)",
    "key_exact_or_relative": "key exact or relative (basic-pitch)",
    "tempo_accuracy1": "tempo within 4 % (librosa)",
    "tempo_accuracy2": "tempo within 4 %, any metrical level (librosa)",
    "audibly_notes": "audibly notes (basic-pitch)",
}


def markdown_table(result: Mapping[str, Any]) -> str:
    """One row a measure: generated, ceiling, floor, p and the clips judged; ends in a newline."""
    lines = [
        "| judged | generated | true renderings | captions shuffled | p | clips (true) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, title in ROWS.items():
        measure = result["measures"][name]
        show = _decimal if name == "instrument_score" else _percent
        cells = [show(measure[column]) for column in ("generated", "truth", "shuffled")]
        p = "–" if measure["p_value"] is None else f"{measure['p_value']:.2g}"
        counts = f"{measure['num_generated']} ({measure['num_truth']})"
        lines.append(f"| {title} | {' | '.join(cells)} | {p} | {counts} |")
    lines.append("")
    lines.append(
        f"p: one-sided permutation test, {result['permutations']:,} dealings of the captions."
    )
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"
