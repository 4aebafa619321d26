"""What semantic tokens tell of the notes: `python -m benchmarks.semantic_tokens --manifest FILE`.

Tokenizers are fitted to clips of training pieces and measured on test pieces: mutual information
with what the scores say is played, and the cost of predicting the tokens from those before. The
table goes to the standard output, all figures to --json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import token_information as information
from musiclm_engine.audio import LogMel, load_audio
from musiclm_engine.audiolm.bands import PitchBands
from musiclm_engine.audiolm.best_rq import BestRQTokenizer
from musiclm_engine.audiolm.clustered import ClusteredTokens
from musiclm_engine.audiolm.note_tokenizer import NoteTokenizer
from musiclm_engine.audiolm.semantic_tokenizer import SemanticTokenizer
from musiclm_engine.checkpoint import load_model, write_json
from musiclm_engine.data.manifest import Clip, load_manifest
from musiclm_engine.training.note_labels import note_labels

SAMPLE_RATE_HZ, HOP = 16000, 640
TRAINED = {cls.__name__: cls for cls in (SemanticTokenizer, NoteTokenizer, BestRQTokenizer)}
CLIPS_AT_A_TIME = 16
CHROMA_SCALE = 37.0  # deviation of all log-mel bands over that of chroma: 28.4 / 0.77, on 24 clips


class Plain(ClusteredTokens):
    """k-means of log-mel bands, of chroma, or of both: the baselines."""

    def __init__(self, num_tokens: int, *, mel: bool, chroma: bool) -> None:
        super().__init__(
            width=64 * mel + 12 * chroma,
            num_components=48 * mel or 12,
            num_tokens=num_tokens,
            sample_rate_hz=SAMPLE_RATE_HZ,
            hop_length=HOP,
        )
        self.parts: list[Callable[[Tensor], Tensor]] = []
        if mel:
            self.parts.append(
                LogMel(SAMPLE_RATE_HZ, n_fft=1024, window_ms=64, hop_ms=40, num_mels=64)
            )
        if chroma:
            self.pitch_bands = PitchBands(
                sample_rate_hz=SAMPLE_RATE_HZ, hop_length=HOP, n_fft=2048, num_bands=72
            )
            self.parts.append(self._chroma)

    @torch.no_grad()
    def features(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> [B, T, 64, 12 or 76]; parts weigh alike when they are joined."""
        parts = [part(self.whole_hops(audio)) for part in self.parts]
        return torch.cat([parts[0], *(CHROMA_SCALE * part for part in parts[1:])], dim=-1)

    def _chroma(self, audio: Tensor) -> Tensor:
        """Energies of the pitch classes over six octaves, of length 1."""
        folded = self.pitch_bands(audio).exp().unflatten(-1, (6, 12)).sum(-2)
        return torch.nn.functional.normalize(folded - folded.amin(-1, keepdim=True), dim=-1)


def whole_clips(clips: Sequence[Clip], frames: int) -> list[Tensor]:
    """The clips' audio, [B, frames * HOP] at a time."""
    loaded = [load_audio(c.audio, SAMPLE_RATE_HZ)[: frames * HOP] for c in clips]
    padded = [torch.nn.functional.pad(a, (0, frames * HOP - len(a))) for a in loaded]
    return list(torch.stack(padded).split(CLIPS_AT_A_TIME))


def pitch_class_sets(clip: Clip, frames: int) -> np.ndarray:
    """[frames] bit sets of the pitch classes that sound at each frame's centre."""
    centres = (np.arange(frames) + 0.5) * HOP / SAMPLE_RATE_HZ
    sets = np.zeros(frames, np.int64)
    for onset, duration, pitch in clip.facts["notes"]:
        sets[(onset <= centres) & (centres < onset + duration)] |= 1 << int(pitch) % 12
    return sets


def labels_of(clips: Sequence[Clip], frames: int) -> dict[str, np.ndarray]:
    """By name, [clips, frames] labels."""
    instruments = sorted({clip.facts["instrument"] for clip in clips})
    rows = torch.arange(len(clips))
    played = note_labels(clips, instruments).of(
        rows, torch.zeros(len(clips)), frames, HOP / SAMPLE_RATE_HZ
    )
    labels = {name: labels.numpy() for name, labels in vars(played).items()}
    return labels | {"pitch classes": np.stack([pitch_class_sets(c, frames) for c in clips])}


def measure(
    fitted: np.ndarray, tokens: np.ndarray, labels: dict[str, np.ndarray], num_tokens: int
) -> dict[str, Any]:
    """Every figure of the tokens [clips, T] of held-out clips; `fitted` are others' for n-grams."""
    row: dict[str, Any] = {}
    for name, wanted in labels.items():
        flat, wanted = tokens.ravel(), wanted.ravel()
        told = information.mutual_information(flat, wanted)
        floor = information.shuffled_floor(flat, wanted, seed=0)
        whole = max(information.entropy(wanted), 1e-12)
        row[name] = {
            "nmi": information.normalised(told, flat, wanted),
            "nmi_shuffled": information.normalised(floor, flat, wanted),
            "explained": told / whole,
            "explained_shuffled": floor / whole,
        }
    row["entropy"] = information.entropy(tokens)
    row["repeated"] = information.repeat_rate(tokens)
    for order, name in enumerate(("unigram_nats", "bigram_nats", "trigram_nats"), start=1):
        row[name] = information.ngram_nats(fitted, tokens, num_tokens, order)
    return row


def report(
    tokenizer: ClusteredTokens,
    fit_audio: list[Tensor],
    test_audio: list[Tensor],
    labels: dict[str, np.ndarray],
    polyphonic: np.ndarray,
) -> dict[str, Any]:
    """The figures of a fitted tokenizer on all test clips, on chorales and on tunes."""
    fitted, tokens = (
        torch.cat([tokenizer.encode(audio) for audio in rows]).numpy()
        for rows in (fit_audio, test_audio)
    )
    row = {}
    for name, of in (("all", slice(None)), ("chorales", polyphonic), ("tunes", ~polyphonic)):
        some = {label: rows[of] for label, rows in labels.items()}
        row[name] = measure(fitted, tokens[of], some, tokenizer.num_tokens)
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown: NMI on all clips (and shuffled), then shares of entropy explained."""
    names = ("instrument", "melody", "bass", "pitch classes")
    lines = [
        "| tokens | "
        + " | ".join(f"NMI {name}" for name in names)
        + " | chorales: soprano | bass | instrument | tunes: melody | instrument | onset"
        + " | repeated | bigram | trigram |",
        "| --- |" + " ---: |" * 13,
    ]
    for name, row in rows.items():
        whole, chorales, tunes = row["all"], row["chorales"], row["tunes"]
        cells = [f"{whole[n]['nmi']:.2f} ({whole[n]['nmi_shuffled']:.2f})" for n in names]
        cells += [f"{chorales[n]['explained']:.0%}" for n in ("melody", "bass", "instrument")]
        cells += [f"{tunes[n]['explained']:.0%}" for n in ("melody", "instrument")]
        cells += [f"{whole['onset']['explained']:.0%}", f"{whole['repeated']:.0%}"]
        cells += [f"{whole[n]:.2f}" for n in ("bigram_nats", "trigram_nats")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--fit-clips", type=int, default=600, help="training clips to fit to")
    parser.add_argument("--test-clips", type=int, default=511)
    parser.add_argument("--num-tokens", type=int, default=1024, help="K of what is fitted here")
    parser.add_argument(
        "--trained", nargs="*", default=[], metavar="NAME=STEM", help="fitted tokenizers to add"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)

    splits = {"train": options.fit_clips, "test": options.test_clips}
    clips = {}
    for split, count in splits.items():
        those = load_manifest(options.manifest, split)
        order = np.random.default_rng(0).permutation(len(those))[:count]
        clips[split] = [those[index] for index in order]
    frames = int(min(c.seconds for some in clips.values() for c in some) * SAMPLE_RATE_HZ) // HOP
    fit_audio, test_audio = (whole_clips(clips[split], frames) for split in splits)
    labels = labels_of(clips["test"], frames)
    polyphonic = np.array([clip.facts["kind"] == "chorale" for clip in clips["test"]])

    K = options.num_tokens
    tokenizers: dict[str, Callable[[], ClusteredTokens]] = {
        "k-means of log-mel": lambda: Plain(K, mel=True, chroma=False),
        "k-means of chroma": lambda: Plain(K, mel=False, chroma=True),
        "k-means of both": lambda: Plain(K, mel=True, chroma=True),
        "`SemanticTokenizer`": lambda: SemanticTokenizer(num_tokens=K, timbre_weight=0.5),
    }
    for entry in options.trained:
        name, _, stem = entry.partition("=")
        tokenizers[name] = partial(load_model, Path(stem), TRAINED)
    rows = {}
    for name, make in tokenizers.items():
        tokenizer = make()
        if not tokenizer.components.any():
            features = torch.cat([tokenizer.features(audio).flatten(0, 1) for audio in fit_audio])
            tokenizer.fit(features, seed=0)
        rows[name] = report(tokenizer, fit_audio, test_audio, labels, polyphonic)
        print(table({name: rows[name]}), flush=True)
    print(table(rows))
    if options.json:
        write_json(
            options.json,
            {
                "fit_clips": len(clips["train"]),
                "test_clips": len(clips["test"]),
                "frames_a_clip": frames,
                "tokenizers": json.loads(json.dumps(rows)),
            },
        )


if __name__ == "__main__":
    main()
