"""The models that are fitted by clustering, not trained by gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from musiclm_engine.audiolm.clustered import ClusteredTokens
from musiclm_engine.checkpoint import save_model
from musiclm_engine.mulan import MuLaN, MuLaNEmbedQuantizer
from musiclm_engine.training.clip_bank import ClipBank
from musiclm_engine.training.config import table
from musiclm_engine.training.semantic_recipe import unfitted_tokenizer
from musiclm_engine.training.workplace import Workplace


def whole_clips(bank: ClipBank, clips: range, device: torch.device) -> Iterator[Tensor]:
    """Clips, some at a time, each from its beginning: [B, samples].

    They are as long as the bank's shortest; a GPU gets more at a time, and of long ones anything gets
    fewer.
    """
    samples = min(bank.lengths)
    most = 8 if device.type == "cpu" else 64  # of ten seconds
    at_a_time = max(1, min(most, most * 10 * bank.sample_rate_hz // samples))
    for rows in torch.arange(clips.start, clips.stop, device=device).split(at_a_time):
        yield bank.crops(rows, torch.zeros_like(rows), samples)


@torch.inference_mode()
def fit_tokenizer(place: Workplace) -> ClusteredTokens:
    """Cluster the features of some training clips, and save the tokenizer."""
    settings = table(place.config, "tokenizer")
    model = unfitted_tokenizer(place)
    bank = place.bank("train", model.sample_rate_hz)
    count = min(settings["clips"], len(bank))
    features: list[Tensor] = []
    for audio in whole_clips(bank, range(count), place.device):
        features += model.features(audio)
        place.progress("tokenizer", len(features), count)
    model.fit(torch.cat(features), seed=place.seed)
    save_model(model, place.run_dir / "tokenizer" / "model", dtype=torch.float16)
    return model


@torch.inference_mode()
def fit_quantizer(place: Workplace) -> MuLaNEmbedQuantizer:
    """Fit the quantiser to MuLaN's embeddings of all training clips and a caption each, and save it.

    Captions are included because prompts are what it will quantise; a caption's embedding lies
    near its clip's, not on it.
    """
    settings = table(place.config, "quantizer")
    mulan: MuLaN = place.trained("mulan")
    bank, clips = place.bank("train", mulan.sample_rate_hz), place.clips("train")
    embeddings: list[Tensor] = []
    done = 0
    for audio in whole_clips(bank, range(len(bank)), place.device):
        some = clips[done : done + len(audio)]
        embeddings.append(mulan.embed_audio(audio))
        embeddings.append(
            mulan.embed_text([c.captions[i % len(c.captions)] for i, c in enumerate(some, done)])
        )
        done += len(audio)
        place.progress("quantizer", done, len(clips))
    model = MuLaNEmbedQuantizer(dim=mulan.dim_latent, **settings["model"]).to(place.device)
    model.fit(torch.cat(embeddings), seed=place.seed)
    save_model(model, place.run_dir / "quantizer" / "model", dtype=torch.float16)
    return model
