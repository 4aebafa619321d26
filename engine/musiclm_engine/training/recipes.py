"""How each model is trained: what it is built from, its batches, its losses, its validation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musiclm_engine.audiolm import (
    CoarseTransformer,
    FineTransformer,
    SemanticTokenizer,
    SemanticTransformer,
)
from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.checkpoint import CheckpointError, save_model
from musiclm_engine.codec import Codec, SoundStream, SpectralSoundStream
from musiclm_engine.components import load_component
from musiclm_engine.data.manifest import load_manifest
from musiclm_engine.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    TextTransformer,
    train_caption_tokenizer,
)
from musiclm_engine.training.clips import Crops, load_crop
from musiclm_engine.training.config import SCHEDULE, ConfigError, table
from musiclm_engine.training.loop import Recipe, Schedule
from musiclm_engine.training.token_cache import TokenCache, tokenize_clips

VALIDATION_BATCHES = 4

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Workplace:
    """Where a model set is being trained.

    Attributes:
        run_dir: holds a folder for each model, and the token caches.
        manifest: of the audio.
        config: as `load_config` gives it.
        device: to train on.
    """

    run_dir: Path
    manifest: Path
    config: dict[str, Any]
    device: torch.device

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    def trained(self, name: str) -> Any:
        """A model that was trained here before.

        Raises:
            CheckpointError: it was not.
        """
        stem = self.run_dir / name / "model"
        if not stem.with_name("model.json").exists():
            raise CheckpointError(f"{stem.parent} has no {name} yet: run `musiclm train {name}`")
        return load_component(name, stem).to(self.device)

    def crops(self, settings: dict[str, Any], sample_rate_hz: int, split: str) -> Crops:
        return Crops(
            load_manifest(self.manifest, split),
            settings["crop_seconds"],
            settings["batch_size"],
            sample_rate_hz,
            self.seed,
        )


CODECS: dict[str, type[Codec]] = {"spectrum": SpectralSoundStream, "waveform": SoundStream}


def schedule(settings: dict[str, Any]) -> Schedule:
    return Schedule(**{key: settings[key] for key in SCHEDULE if key in settings})


def codec_recipe(place: Workplace) -> Recipe:
    settings = table(place.config, "codec")
    domain = settings.get("domain", "spectrum")
    if domain not in CODECS:
        raise ConfigError(f"[codec] has domain = {domain!r}, wanted one of {', '.join(CODECS)}")
    cls = CODECS[domain]
    model = cls(**settings["model"])
    train = place.crops(settings, model.sample_rate_hz, "train")
    held_out = place.crops(settings, model.sample_rate_hz, "validation")

    def validation() -> dict[str, float]:
        return _mean_losses(lambda step: model(held_out.batch(step)[0].to(place.device)))

    return Recipe(model, lambda step: model(train.batch(step)[0].to(place.device)), validation)


def mulan_recipe(place: Workplace) -> Recipe:
    settings = table(place.config, "mulan")
    clips = load_manifest(place.manifest, "train")
    tokenizer = train_caption_tokenizer(
        [caption for clip in clips for caption in clip.captions], settings["vocab_size"]
    )
    model = MuLaN(
        AudioSpectrogramTransformer(**settings["audio"]),
        TextTransformer(num_tokens=tokenizer.get_vocab_size(), **settings["text"]),
        settings["dim_latent"],
        tokenizer=tokenizer,
    )
    train = place.crops(settings, model.sample_rate_hz, "train")
    held_out = place.crops(settings, model.sample_rate_hz, "validation")

    def losses(step: int) -> dict[str, Tensor]:
        audio, captions = train.batch(step)
        loss = model(audio.to(place.device), captions, chunk_size=settings.get("chunk_size"))
        return {"loss": loss}

    def validation() -> dict[str, float]:
        figures = []
        for step in range(VALIDATION_BATCHES):
            audio, captions = held_out.batch(step)
            similarity = model.embed_audio(audio.to(place.device)) @ model.embed_text(captions).T
            # The share of other captions that a clip's own beats: 0.5 is chance, 1 perfect.
            own = similarity.diagonal()[:, None]
            others = similarity.numel() - len(similarity)
            figures.append(((own > similarity).sum() / others).item())
        return {"retrieval_auc": sum(figures) / len(figures)}

    return Recipe(model, losses, validation)


def fit_tokenizer(place: Workplace, on_progress: Progress | None = None) -> SemanticTokenizer:
    """Cluster the features of some training clips, and save the tokenizer."""
    settings = table(place.config, "tokenizer")
    model = SemanticTokenizer(**settings["model"]).to(place.device)
    clips = load_manifest(place.manifest, "train")[: settings["clips"]]
    features = []
    for done, clip in enumerate(clips, start=1):
        audio = load_crop(clip, 0.0, clip.seconds, model.sample_rate_hz)
        features.append(model.features(audio[None].to(place.device))[0])
        if on_progress is not None:
            on_progress(done, len(clips))
    model.fit(torch.cat(features), seed=place.seed)
    save_model(model, place.run_dir / "tokenizer" / "model")
    return model


@torch.inference_mode()
def fit_quantizer(place: Workplace, on_progress: Progress | None = None) -> MuLaNEmbedQuantizer:
    """Fit the quantiser to MuLaN's embeddings of all training clips and a caption each, and save it.

    Captions are included because prompts are what it will quantise; a caption's embedding lies
    near its clip's, not on it.
    """
    settings = table(place.config, "quantizer")
    mulan: MuLaN = place.trained("mulan")
    clips = load_manifest(place.manifest, "train")
    seconds = min(clip.seconds for clip in clips)
    embeddings = []
    for start in range(0, len(clips), 8):
        some = clips[start : start + 8]
        audio = torch.stack([load_crop(c, 0.0, seconds, mulan.sample_rate_hz) for c in some])
        embeddings.append(mulan.embed_audio(audio.to(place.device)))
        captions = [c.captions[i % len(c.captions)] for i, c in enumerate(some, start)]
        embeddings.append(mulan.embed_text(captions))
        if on_progress is not None:
            on_progress(min(start + 8, len(clips)), len(clips))
    model = MuLaNEmbedQuantizer(dim=mulan.dim_latent, **settings["model"]).to(place.device)
    model.fit(torch.cat(embeddings), seed=place.seed)
    save_model(model, place.run_dir / "quantizer" / "model")
    return model


def tokens(place: Workplace, split: str, on_progress: Progress | None = None) -> TokenCache:
    """The split's token cache, made now if it is not there or older than what makes tokens."""
    path = place.run_dir / "tokens" / f"{split}.safetensors"
    makers = [place.manifest] + [
        place.run_dir / name / "model.safetensors"
        for name in ("codec", "tokenizer", "mulan", "quantizer")
    ]
    newest = max((maker.stat().st_mtime for maker in makers if maker.exists()), default=0.0)
    if not path.exists() or path.stat().st_mtime < newest:
        tokenize_clips(
            load_manifest(place.manifest, split),
            codec=place.trained("codec"),
            tokenizer=place.trained("tokenizer"),
            mulan=place.trained("mulan"),
            quantizer=place.trained("quantizer"),
            on_progress=on_progress,
        ).save(path)
    return TokenCache.load(path)


def stage_recipe(place: Workplace, name: str, on_progress: Progress | None = None) -> Recipe:
    """The recipe of the semantic, coarse or fine stage."""
    settings = table(place.config, name)
    codec = place.trained("codec")
    tokenizer: SemanticTokenizer = place.trained("tokenizer")
    quantizer: MuLaNEmbedQuantizer = place.trained("quantizer")
    num_coarse = table(place.config, "coarse")["num_coarse_quantizers"]
    num_fine = table(place.config, "fine")["num_fine_quantizers"]
    conditioning = {
        "conditioning_size": quantizer.codebook_size,
        "conditioning_length": quantizer.num_quantizers,
    }
    stride = tokenizer.hop_length // codec.hop_length
    if stride * codec.hop_length != tokenizer.hop_length:
        raise ConfigError(
            f"a semantic token lasts {tokenizer.hop_length} samples, "
            f"wanted a multiple of the codec's {codec.hop_length}"
        )
    model: Stage
    if name == "semantic":
        model = SemanticTransformer(
            num_semantic_tokens=tokenizer.num_tokens, **conditioning, **settings["model"]
        )
    elif name == "coarse":
        model = CoarseTransformer(
            num_semantic_tokens=tokenizer.num_tokens,
            codebook_size=codec.codebook_size,
            num_coarse_quantizers=num_coarse,
            frames_per_semantic=stride,
            **conditioning,
            **settings["model"],
        )
    else:
        model = FineTransformer(
            codebook_size=codec.codebook_size,
            num_coarse_quantizers=num_coarse,
            num_fine_quantizers=num_fine,
            **conditioning,
            **settings["model"],
        )
    frames = round(settings["crop_seconds"] * codec.frame_rate_hz) // stride * stride
    caches = {split: tokens(place, split, on_progress) for split in ("train", "validation")}

    def losses(split: str, step: int) -> dict[str, Tensor]:
        condition, semantic, acoustic = (
            rows.to(place.device)
            for rows in caches[split].batch(
                size=settings["batch_size"],
                frames=frames,
                stride=stride,
                text_share=settings["text_share"],
                seed=place.seed,
                step=step,
            )
        )
        if name == "semantic":
            by_level = model.loss(condition, None, semantic[:, :, None])
        elif name == "coarse":
            by_level = model.loss(condition, semantic[:, :, None], acoustic[:, :, :num_coarse])
        else:
            by_level = model.loss(
                condition,
                acoustic[:, :, :num_coarse],
                acoustic[:, :, num_coarse : num_coarse + num_fine],
            )
        levels = {f"level_{level}": loss.detach() for level, loss in enumerate(by_level)}
        return {"loss": by_level.mean(), **levels}

    return Recipe(
        model,
        lambda step: losses("train", step),
        lambda: _mean_losses(lambda step: losses("validation", step)),
    )


def _mean_losses(losses: Callable[[int], dict[str, Tensor]]) -> dict[str, float]:
    batches = [losses(step) for step in range(VALIDATION_BATCHES)]
    return {name: sum(b[name].item() for b in batches) / len(batches) for name in batches[0]}
