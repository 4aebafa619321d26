"""How MuLaN is trained: its batches, its losses, its validation."""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from musiclm_engine.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    TextTransformer,
    train_caption_tokenizer,
)
from musiclm_engine.mulan.words import vocabulary
from musiclm_engine.training.clips import Crops
from musiclm_engine.training.config import table
from musiclm_engine.training.facts import Facts, FactTargets
from musiclm_engine.training.loop import Recipe
from musiclm_engine.training.workplace import VALIDATION_BATCHES, Workplace


def mulan_recipe(place: Workplace) -> Recipe:
    """Contrast of clips and captions and, where [mulan] names facts, what both say of them."""
    settings = table(place.config, "mulan")
    clips = place.clips("train")
    tokenizer = train_caption_tokenizer(
        [caption for clip in clips for caption in clip.captions], settings["vocab_size"]
    )
    model = MuLaN(
        AudioSpectrogramTransformer(**settings["audio"]),
        TextTransformer(num_tokens=tokenizer.get_vocab_size(), **settings["text"]),
        settings["dim_latent"],
        tokenizer=tokenizer,
        words=vocabulary(caption for clip in clips for caption in clip.captions),
    )
    train = place.crops(settings, model.sample_rate_hz, "train")
    held_out = place.crops(settings, model.sample_rate_hz, "validation")
    if not settings.get("facts"):

        def contrast(step: int) -> dict[str, Tensor]:
            return {"loss": model(*train.batch(step), chunk_size=settings.get("chunk_size"))}

        return Recipe(model, contrast, lambda: _retrieval(model, held_out))

    facts = Facts(settings["facts"], clips, model.dim_latent, place.seed, place.device)
    known = {id(crops): facts.targets(crops.clips) for crops in (train, held_out)}

    def targets(crops: Crops, step: int) -> tuple[FactTargets, FactTargets]:
        """Of the audio and of the captions of a batch."""
        draw = crops.draw(step)
        stated = np.array(
            [
                facts.stated(crops.clips[row], caption)
                for row, caption in zip(draw.rows, draw.chosen, strict=True)
            ]
        )
        # Small copies, which a GPU need not wait for.
        rows, said = (
            torch.from_numpy(some).to(place.device, non_blocking=True)
            for some in (draw.rows, stated)
        )
        shares, heard = known[id(crops)].shares[rows], known[id(crops)].known[rows]
        return FactTargets(shares, heard), FactTargets(shares, heard & said)

    def losses(step: int) -> dict[str, Tensor]:
        contrast, of_audio, of_text = model.contrast_with_embeddings(
            *train.batch(step), chunk_size=settings.get("chunk_size")
        )
        heard, said = targets(train, step)
        hearing, reading = facts.loss(of_audio, heard), facts.loss(of_text, said)
        return {
            "loss": contrast + hearing + reading,
            "contrast": contrast,
            "hearing": hearing,
            "reading": reading,
        }

    def validation() -> dict[str, float]:
        right: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for step in range(VALIDATION_BATCHES):
            audio, captions = held_out.batch(step)
            heard, said = targets(held_out, step)
            embeddings = model.embed_audio(audio), model.embed_text(captions)
            for kind, found, about in zip(
                ("heard", "read"), embeddings, (heard, said), strict=True
            ):
                for name, (hits, of) in facts.hits(found, about).items():
                    right[f"{kind}_{name}"] += hits
                    rows[f"{kind}_{name}"] += of
        return _retrieval(model, held_out) | {n: right[n] / max(1, rows[n]) for n in rows}

    return Recipe(model, losses, validation)


def _retrieval(model: MuLaN, held_out: Crops) -> dict[str, float]:
    figures = []
    for step in range(VALIDATION_BATCHES):
        audio, captions = held_out.batch(step)
        similarity = model.similarity(audio, captions)
        # The share of other captions that a clip's own beats: 0.5 is chance, 1 perfect.
        own = similarity.diagonal()[:, None]
        others = similarity.numel() - len(similarity)
        figures.append(((own > similarity).sum() / others).item())
    return {"retrieval_auc": sum(figures) / len(figures)}
