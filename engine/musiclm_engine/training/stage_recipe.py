"""How the semantic, coarse and fine stages are trained, on tokens that are made once."""

from pathlib import Path

from torch import Tensor

from musiclm_engine.audiolm import (
    CoarseTransformer,
    FineTransformer,
    SemanticTransformer,
)
from musiclm_engine.audiolm.beat_clock import tempo_tokens
from musiclm_engine.audiolm.clustered import ClusteredTokens
from musiclm_engine.audiolm.stage import Stage
from musiclm_engine.data.manifest import Clip, ManifestError
from musiclm_engine.mulan import MuLaNEmbedQuantizer
from musiclm_engine.training.config import ConfigError, table
from musiclm_engine.training.facts import tempo_of
from musiclm_engine.training.fitted import whole_clips
from musiclm_engine.training.loop import Recipe
from musiclm_engine.training.token_cache import TokenCache, tokenize_clips
from musiclm_engine.training.workplace import Workplace, compiled, mean_losses

MAKERS = ("codec", "tokenizer", "mulan", "quantizer")  # of tokens
CLIPS_A_PART = 1024  # of a token cache that is being made


def tokens(place: Workplace, split: str) -> TokenCache:
    """The split's token cache, made now if it is not there or older than what makes tokens.

    It is made in parts, each of which is kept if the rest is cut short.
    """
    folder = place.run_dir / "tokens"
    makers = [place.manifest, *(place.run_dir / name / "model.safetensors" for name in MAKERS)]
    newest = max((maker.stat().st_mtime for maker in makers if maker.exists()), default=0.0)

    def is_current(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime >= newest

    whole = folder / f"{split}.safetensors"
    if is_current(whole):
        return TokenCache.load(whole, place.device)
    models = {name: place.trained(name) for name in MAKERS}
    bank, clips = place.bank(split, models["codec"].sample_rate_hz), place.clips(split)

    def make(some: range, part: Path) -> None:
        tokenize_clips(
            whole_clips(bank, some, place.device),
            [clips[row].captions for row in some],
            tempo_bpm=[_tempo(clips[row]) for row in some],
            **models,
            on_progress=lambda done, _: place.progress("tokens", some.start + done, len(bank)),
        ).save(part)

    parts = []
    for first in range(0, len(bank), CLIPS_A_PART):
        parts.append(folder / f"{split}.{first}.safetensors")
        if not is_current(parts[-1]):
            make(range(first, min(first + CLIPS_A_PART, len(bank))), parts[-1])
    TokenCache.joined([TokenCache.load(part) for part in parts]).save(whole)
    for part in parts:
        part.unlink()
    return TokenCache.load(whole, place.device)


def _tempo(clip: Clip) -> float:
    """0 where it is not known: sets that count beats have refused that (`training.run.train`), and to
    others facts may be anything."""
    try:
        return tempo_of(clip) or 0.0
    except ManifestError:
        return 0.0


def stage_recipe(place: Workplace, name: str) -> Recipe:
    """The recipe of the semantic, coarse or fine stage."""
    settings = table(place.config, name)
    codec = place.trained("codec")
    tokenizer: ClusteredTokens = place.trained("tokenizer")
    quantizer: MuLaNEmbedQuantizer = place.trained("quantizer")
    num_coarse = table(place.config, "coarse")["num_coarse_quantizers"]
    num_fine = table(place.config, "fine")["num_fine_quantizers"]
    conditioning = {
        "conditioning_size": quantizer.codebook_size,
        "conditioning_length": quantizer.num_quantizers,
        "conditioning_dim": quantizer.dim,
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
            num_semantic_tokens=tokenizer.num_tokens,
            frame_rate_hz=codec.frame_rate_hz / stride if settings.get("counts_beats") else None,
            **conditioning,
            **settings["model"],
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
    model.condition_embedding.take_codebooks(quantizer.codebooks)
    frames = round(settings["crop_seconds"] * codec.frame_rate_hz) // stride * stride
    caches = {split: tokens(place, split) for split in ("train", "validation")}
    if model.clock is not None and any((cache.tempo_bpm == 0).any() for cache in caches.values()):
        raise ConfigError(
            "[semantic] has counts_beats = true, wanted false for clips without the fact tempo_bpm"
        )

    # What conditioning says shows in how a crop begins: later most can be told from what came before,
    # and a long crop begins once. Attention costs less too.
    short_crops = settings.get("short_crops", 1)
    if type(short_crops) is not int or short_crops < 1:
        raise ConfigError(
            f"[{name}] has short_crops = {short_crops!r}, wanted a whole number from 1 up"
        )
    loss = compiled(model.loss, settings)

    def losses(split: str, step: int) -> dict[str, Tensor]:
        shorter = short_crops if split == "train" and step % 2 else 1
        condition, semantic, acoustic, tempo_bpm = caches[split].batch(
            size=settings["batch_size"] * shorter,
            frames=frames // stride // shorter * stride,
            stride=stride,
            text_share=settings["text_share"],
            seed=place.seed,
            step=step,
        )
        tempo = None if model.clock is None else tempo_tokens(tempo_bpm)
        if name == "semantic":
            by_level = loss(condition, None, semantic[:, :, None], tempo)
        elif name == "coarse":
            by_level = loss(condition, semantic[:, :, None], acoustic[:, :, :num_coarse])
        else:
            by_level = loss(
                condition,
                acoustic[:, :, :num_coarse],
                acoustic[:, :, num_coarse : num_coarse + num_fine],
            )
        levels = {f"level_{level}": mean for level, mean in enumerate(by_level.detach())}
        return {"loss": by_level.mean(), **levels}

    return Recipe(
        model,
        lambda step: losses("train", step),
        lambda: mean_losses(lambda step: losses("validation", step)),
    )
