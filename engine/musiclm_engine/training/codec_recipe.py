"""How a codec is trained: on what it rebuilds and, where [codec.adversary] is, by discriminators."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from musiclm_engine.codec import SoundStream, SpectralSoundStream
from musiclm_engine.codec.adversarial_losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
)
from musiclm_engine.codec.discriminators import SpectrumDiscriminators, WaveformDiscriminators
from musiclm_engine.training.config import ConfigError, table
from musiclm_engine.training.loop import Adversary, Recipe
from musiclm_engine.training.workplace import Workplace, compiled, mean_losses

Discriminators = WaveformDiscriminators | SpectrumDiscriminators

DOMAINS: dict[str, tuple[type[SoundStream | SpectralSoundStream], type[Discriminators]]] = {
    "spectrum": (SpectralSoundStream, SpectrumDiscriminators),
    "waveform": (SoundStream, WaveformDiscriminators),
}
# Weights where the configuration says none: SoundStream's; and one with which the gradients of all
# three losses by the painted magnitudes were of one size, 0.02 (measured on the bundled codec, after
# 300 steps of its discriminators).
FEATURES = {"waveform": 100.0, "spectrum": 10.0}


@dataclass(frozen=True)
class AdversarySettings:
    """The table [codec.adversary].

    Attributes:
        after: steps of the codec alone, before discriminators come in.
        rate: their learning rate, in those of the codec.
        adversarial: weight of being taken for real (lambda_adv of SoundStream, section III-E).
        features: weight of the discriminators' features (lambda_feat).
        reconstruction: weight of the codec's own losses (lambda_rec). SoundStream sums its
            spectral loss over six windows, which is a mean here.
        model: arguments of the discriminators.
    """

    after: int = 0
    rate: float = 0.1
    adversarial: float = 1.0
    features: float = 100.0
    reconstruction: float = 1.0
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.after, int) or self.after < 0:
            raise ValueError(f"after is {self.after!r}, wanted a whole number of steps from 0 up")
        for name in ("rate", "adversarial", "features", "reconstruction"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}, wanted a number from 0 up")


def codec_recipe(place: Workplace) -> Recipe:
    settings = table(place.config, "codec")
    domain = settings.get("domain", "spectrum")
    if domain not in DOMAINS:
        raise ConfigError(f"[codec] has domain = {domain!r}, wanted one of {', '.join(DOMAINS)}")
    codec, discriminators = DOMAINS[domain]
    model = codec(**settings["model"])
    train = place.crops(settings, model.sample_rate_hz, "train")
    held_out = place.crops(settings, model.sample_rate_hz, "validation")
    losses = compiled(model, settings)

    def validation() -> dict[str, float]:
        return mean_losses(lambda step: losses(held_out.batch(step)[0]))

    if "adversary" not in settings:
        return Recipe(model, lambda step: losses(train.batch(step)[0]), validation)

    if not isinstance(settings["adversary"], dict):
        found = settings["adversary"]
        raise ConfigError(f"[codec] has adversary = {found!r}, wanted a table [codec.adversary]")
    given: dict[str, Any] = {"features": FEATURES[domain]} | settings["adversary"]
    against = AdversarySettings(**given)
    opponent = discriminators(**against.model)
    rebuild = compiled(model.rebuild, settings)

    def losses_against(step: int) -> dict[str, Tensor]:
        audio = train.batch(step)[0]
        if step < against.after:
            return losses(audio)
        rebuilt, target, of_codec = rebuild(audio)
        real, fake = opponent(target), opponent(rebuilt)
        adversarial, features = adversarial_loss(fake), feature_loss(real, fake)
        return of_codec | {
            "loss": against.reconstruction * of_codec["loss"]
            + against.adversarial * adversarial
            + against.features * features,
            "reconstruction": of_codec["loss"],
            "adversarial": adversarial,
            "features": features,
            "adversary_loss": discriminator_loss(real, fake),
        }

    return Recipe(model, losses_against, validation, Adversary(opponent, against.rate))
