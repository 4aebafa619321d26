"""What is known of clips, as directions in which MuLaN's embeddings are taught to point.

A contrastive loss on a few dozen clips is satisfied by what tells them apart most easily, the
instrument and the texture; keys and tempi stay out of the embedding, and then out of all that is
conditioned on it. So each value of a fact gets an axis of the embedding space, and both towers
learn to lie along it: a classifier whose weights are fixed and orthonormal (Hoffer, Hubara and
Soudry, arXiv 1801.04540), the same for audio and for text. It has nothing to train or to keep.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musiclm_engine.data.manifest import Clip, ManifestError

LOGIT_SCALE = 16.0  # a fact with a sixth of an embedding's energy is then 98 % sure of 24 values
TEMPO_STEP = 0.04  # in ln(bpm): what judges of tempo take for the same
TEMPI_BPM = (10, 1000)  # that are taken for tempi
TEMPO_SPREAD = 1.0  # steps: standard deviation of a tempo's share in its neighbours

# Names that one fact has in captions: a key is a tonic with a mode, and either may be said alone.
STATED_BY = {"key": ("key",), "mode": ("key", "mode")}


@dataclass(frozen=True)
class FactTargets:
    """Facts of N clips.

    Attributes:
        shares: [N, C], for each fact the distribution over its values; zeros where it is unknown.
        known: [N, facts] bool.
    """

    shares: Tensor
    known: Tensor

    def to(self, device: torch.device) -> "FactTargets":
        return FactTargets(self.shares.to(device), self.known.to(device))


class Facts:
    """The values of some facts, and an axis for each.

    Args:
        names: of facts in the manifest: words, or a number named tempo_bpm.
        clips: to take the values from.
        dim: D, of the embeddings.
        seed: of the axes.
        device: to work on.

    Raises:
        ManifestError: no clip has one of the facts, or a clip has one that is not of that form.
        ValueError: there are more values than dimensions.
    """

    def __init__(
        self,
        names: Sequence[str],
        clips: Sequence[Clip],
        dim: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.names = tuple(names)
        self.values: dict[str, list[Any]] = {}
        self._spread: dict[str, Callable[[Any], Tensor]] = {}
        for name in self.names:
            found = {_value(clip, name) for clip in clips} - {None}
            if not found:
                raise ManifestError(f"no clip has the fact {name}, which [mulan] facts names")
            if name == "tempo_bpm":
                self.values[name] = _tempo_steps(min(found), max(found))
            else:
                self.values[name] = sorted(found)
        sizes = [len(values) for values in self.values.values()]
        if sum(sizes) > dim:
            raise ValueError(f"the facts have {sum(sizes)} values, wanted at most dim_latent {dim}")
        self.sizes = sizes
        generator = torch.Generator().manual_seed(seed)
        square = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        self.axes = square[: sum(sizes)].to(device)  # [C, D], rows orthonormal

    def targets(self, clips: Sequence[Clip]) -> FactTargets:
        """What a classifier should say of clips; of values never seen in training, nothing."""
        shares = [
            torch.stack([self._shares(name, _value(clip, name)) for clip in clips])
            for name in self.names
        ]
        known = torch.stack([part.sum(1) > 0 for part in shares], dim=1)
        return FactTargets(torch.cat(shares, dim=1), known).to(self.axes.device)

    def stated(self, clip: Clip, caption: int) -> list[bool]:
        """Which facts a caption of a clip states."""
        said = clip.stated[caption]
        return [any(word in said for word in STATED_BY.get(n, (n,))) for n in self.names]

    def loss(self, embeddings: Tensor, targets: FactTargets) -> Tensor:
        """Cross-entropy of embeddings [B, D] with what is known of them, a mean over facts."""
        losses = []
        for logits, shares, known in self._by_fact(embeddings, targets):
            of_rows = -(shares * logits.log_softmax(-1)).sum(-1)
            losses.append(of_rows.sum() / known.sum().clamp_min(1))  # unknown shares are zeros
        return torch.stack(losses).mean()

    def hits(self, embeddings: Tensor, targets: FactTargets) -> dict[str, tuple[int, int]]:
        """By fact: for how many rows the likeliest value is right, and for how many it is known."""
        counts = {}
        for name, (logits, shares, known) in zip(
            self.names, self._by_fact(embeddings, targets), strict=True
        ):
            right = (logits.argmax(-1) == shares.argmax(-1)) & known
            counts[name] = int(right.sum()), int(known.sum())
        return counts

    def _by_fact(
        self, embeddings: Tensor, targets: FactTargets
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        logits = LOGIT_SCALE * embeddings.float() @ self.axes.T
        by_fact = zip(
            logits.split(self.sizes, dim=1),
            targets.shares.split(self.sizes, dim=1),
            targets.known.unbind(1),
            strict=True,
        )
        return [(of_fact, shares * known[:, None], known) for of_fact, shares, known in by_fact]

    def _shares(self, name: str, value: Any) -> Tensor:
        values = self.values[name]
        shares = torch.zeros(len(values))
        if name == "tempo_bpm" and value is not None:
            away = (torch.tensor(values).log() - math.log(value)) / TEMPO_STEP
            shares = (-0.5 * (away / TEMPO_SPREAD) ** 2).softmax(0)
        elif value in values:
            shares[values.index(value)] = 1.0
        return shares


def tempo_of(clip: Clip) -> float | None:
    """The clip's beats a minute, if it is known.

    Raises ManifestError where the fact is no such number.
    """
    value = _value(clip, "tempo_bpm")
    return None if value is None else float(value)


def tempi_of(clips: Sequence[Clip]) -> list[float]:
    """The beats a minute of clips.

    Raises ManifestError where they are not known.
    """
    tempi = []
    for clip in clips:
        bpm = tempo_of(clip)
        if bpm is None:
            raise ManifestError(
                f"{clip.audio} has no fact tempo_bpm, wanted it or [semantic] counts_beats = false"
            )
        tempi.append(bpm)
    return tempi


def _value(clip: Clip, name: str) -> Any:  # None, a word or a number
    value: Any = clip.facts.get(name)
    if name == "tempo_bpm":
        slowest, fastest = TEMPI_BPM
        fits = type(value) in (int, float) and slowest <= value <= fastest
        wanted = f"beats a minute, {slowest} to {fastest}"
    else:
        fits, wanted = isinstance(value, str | int | float), "a word or a number"
    if value is not None and not fits:
        raise ManifestError(f"{clip.audio} has the fact {name} = {value!r}, wanted {wanted}")
    return value


def _tempo_steps(slowest: float, fastest: float) -> list[float]:
    count = 1 + math.ceil(math.log(fastest / slowest) / TEMPO_STEP)
    return [slowest * math.exp(TEMPO_STEP * step) for step in range(count)]
