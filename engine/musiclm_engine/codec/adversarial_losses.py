"""Losses between a codec and its discriminators: hinge and features (SoundStream, section III-E).

SoundStream is arXiv 2107.03312. Every mean is taken first over what one tensor holds, then over
layers, then over discriminators, so neither the length of the audio nor the size of a
discriminator weighs. All sums run in float32.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Verdict(NamedTuple):
    """What one discriminator says of a batch.

    Attributes:
        features: outputs of its inner layers, [B, C, ...] each.
        logits: [B, ...], positive where it takes the batch for the real thing.
    """

    features: list[Tensor]
    logits: Tensor


def discriminator_loss(real: Sequence[Verdict], fake: Sequence[Verdict]) -> Tensor:
    """mean(max(0, 1 - D(x)) + max(0, 1 + D(G(x)))): 2 for who cannot tell, 0 for who is sure."""
    return _mean(
        F.relu(1 - of_real.logits.float()).mean() + F.relu(1 + of_fake.logits.float()).mean()
        for of_real, of_fake in zip(real, fake, strict=True)
    )


def adversarial_loss(fake: Sequence[Verdict]) -> Tensor:
    """mean(max(0, 1 - D(G(x)))): what the codec descends to be taken for real."""
    return _mean(F.relu(1 - verdict.logits.float()).mean() for verdict in fake)


def feature_loss(real: Sequence[Verdict], fake: Sequence[Verdict]) -> Tensor:
    """mean |D^(l)(x) - D^(l)(G(x))| over layers l; no gradient goes by way of the real audio."""
    return _mean(
        _mean(
            (y - x.detach()).abs().mean(dtype=torch.float32)
            for x, y in zip(of_real.features, of_fake.features, strict=True)
        )
        for of_real, of_fake in zip(real, fake, strict=True)
    )


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
