"""How the network beneath the semantic tokens is trained: the table [semantic_encoder].

`kind = "notes"` reads scores (`NoteTokenizer`), `kind = "best-rq"` needs audio alone
(`BestRQTokenizer`). Clusters are found afterwards, by `fit` on some clips' features.
"""

from typing import Any

import torch
from torch import Tensor

from musiclm_engine.audiolm.best_rq import BestRQTokenizer
from musiclm_engine.audiolm.note_tokenizer import Notes, NoteTokenizer
from musiclm_engine.audiolm.semantic_tokenizer import SemanticTokenizer
from musiclm_engine.training.clips import Crops
from musiclm_engine.training.config import ConfigError, table
from musiclm_engine.training.loop import Recipe
from musiclm_engine.training.note_labels import NoteLabels, note_labels
from musiclm_engine.training.workplace import Workplace, mean_losses

STANDARDISING_BATCHES = 4
QUIETEST = 0.1  # of the amplitudes that notes are learned at: clips all have one, prompts any


def semantic_encoder_recipe(place: Workplace) -> Recipe:
    """The recipe of the encoder that [semantic_encoder] describes."""
    settings = table(place.config, "semantic_encoder")
    kinds = {"notes": _note_recipe, "best-rq": _best_rq_recipe}
    kind = settings.get("kind", "notes")
    if kind not in kinds:
        raise ConfigError(f"[semantic_encoder] has kind = {kind!r}, wanted one of {list(kinds)}")
    return kinds[kind](place, settings)


def unfitted_tokenizer(
    place: Workplace,
) -> SemanticTokenizer | NoteTokenizer | BestRQTokenizer:
    """The tokenizer to fit: the trained encoder, or one of spectra where none is configured."""
    if "semantic_encoder" in place.config:
        return place.trained("semantic_encoder")
    return SemanticTokenizer(**table(place.config, "tokenizer")["model"]).to(place.device)


def _note_recipe(place: Workplace, settings: dict[str, Any]) -> Recipe:
    instruments = sorted({str(clip.facts.get("instrument")) for clip in place.clips("train")})
    model = NoteTokenizer(instruments=instruments, **settings["model"]).to(place.device)
    crops, labels = {}, {}
    for split in ("train", "validation"):
        crops[split] = place.crops(settings, model.sample_rate_hz, split)
        labels[split] = note_labels(place.clips(split), instruments).to(place.device)
    model.standardise(_some_audio(crops["train"]))

    def losses(step: int) -> dict[str, Tensor]:
        audio = crops["train"].batch(step)[0]
        gain = QUIETEST ** torch.rand(len(audio), 1, device=audio.device)
        return model.loss(gain * audio, _labels(model, crops["train"], labels["train"], step))

    def held_out(step: int) -> dict[str, Tensor]:
        audio = crops["validation"].batch(step)[0]
        return model.loss(audio, _labels(model, crops["validation"], labels["validation"], step))

    return Recipe(model, losses, lambda: mean_losses(held_out))


def _best_rq_recipe(place: Workplace, settings: dict[str, Any]) -> Recipe:
    model = BestRQTokenizer(**settings["model"]).to(place.device)
    train = place.crops(settings, model.sample_rate_hz, "train")
    held_out = place.crops(settings, model.sample_rate_hz, "validation")
    model.standardise(_some_audio(train))
    return Recipe(
        model,
        lambda step: model.loss(train.batch(step)[0]),
        lambda: mean_losses(lambda step: model.loss(held_out.batch(step)[0])),
    )


def _labels(model: NoteTokenizer, crops: Crops, labels: NoteLabels, step: int) -> Notes:
    """The labels of `crops.batch(step)`."""
    draw, device = crops.draw(step), labels.instrument.device
    return labels.of(
        torch.from_numpy(draw.rows).to(device, non_blocking=True),
        torch.from_numpy(draw.starts).to(device, non_blocking=True) / model.sample_rate_hz,
        -(-crops.samples // model.hop_length),
        model.hop_length / model.sample_rate_hz,
    )


def _some_audio(crops: Crops) -> Tensor:
    return torch.cat([crops.batch(step)[0] for step in range(STANDARDISING_BATCHES)])
