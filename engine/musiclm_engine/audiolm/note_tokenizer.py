"""Semantic tokens of what is played: a small network reads notes, k-means clusters what it reads.

The network is trained on audio whose scores are known. For each frame it gives four
distributions: the highest note, the lowest note, the instrument, and whether a note begins. The
square roots of two distributions are as far apart as their Hellinger distance says, which bounds
their divergence from both sides; so clusters of square roots keep what the distributions tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.audiolm.bands import FrontEnd
from musiclm_engine.audiolm.clustered import ClusteredTokens

LOWEST_PITCH = 21  # MIDI; A0, the lowest key of a piano
NUM_PITCHES = 88
SILENCE = 0  # the class of a frame without notes; class n is the pitch LOWEST_PITCH + n - 1


@dataclass(frozen=True)
class Notes:
    """What is played in each frame; as labels [B, T] int64, as logits [B, T, classes].

    Attributes:
        melody: the highest note that sounds, of 1 + NUM_PITCHES classes.
        bass: the lowest one.
        onset: 1 where a note begins, of 2 classes.
        instrument: its number.
    """

    melody: Tensor
    bass: Tensor
    onset: Tensor
    instrument: Tensor


class TimeBlock(nn.Module):
    """A convolution over three frames and a layer back, added to what they read."""

    def __init__(self, dim: int, expansion: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mix_time = nn.Conv1d(dim, expansion * dim, 3, padding=1)
        self.contract = nn.Linear(expansion * dim, dim)
        nn.init.normal_(self.contract.weight, std=0.01)  # a block begins as next to nothing
        nn.init.zeros_(self.contract.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        hidden = self.mix_time(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.contract(F.gelu(hidden))


class NoteTokenizer(ClusteredTokens):
    """Audio to one token a frame; `loss` trains the network, then `fit` finds the clusters.

    A frame sees `depth` hops to either side, and half the front end's longest window.

    Args:
        instruments: their names, in the order of their numbers.
        num_tokens: K, clusters.
        num_components: D, principal components of the distributions that are kept.
        sample_rate_hz: of the audio.
        hop_length: samples a token stands for.
        dim: width of the network.
        depth: its blocks.
        instrument_weight: how much the instrument counts beside a note in the clusters.
        onset_weight: how much it counts that a note begins.
    """

    def __init__(
        self,
        *,
        instruments: Sequence[str],
        num_tokens: int = 1024,
        num_components: int = 96,
        sample_rate_hz: int = 16000,
        hop_length: int = 640,
        dim: int = 192,
        depth: int = 4,
        instrument_weight: float = 1.0,
        onset_weight: float = 0.7,
    ) -> None:
        classes = {
            "melody": 1 + NUM_PITCHES,
            "bass": 1 + NUM_PITCHES,
            "onset": 2,
            "instrument": len(instruments),
        }
        super().__init__(
            width=sum(classes.values()),
            num_components=num_components,
            num_tokens=num_tokens,
            sample_rate_hz=sample_rate_hz,
            hop_length=hop_length,
        )
        self.config = {
            "instruments": list(instruments),
            "num_tokens": num_tokens,
            "num_components": num_components,
            "sample_rate_hz": sample_rate_hz,
            "hop_length": hop_length,
            "dim": dim,
            "depth": depth,
            "instrument_weight": instrument_weight,
            "onset_weight": onset_weight,
        }
        self.weights = {"onset": onset_weight, "instrument": instrument_weight}
        self.front_end = FrontEnd(sample_rate_hz=sample_rate_hz, hop_length=hop_length)
        self.network = nn.Sequential(
            nn.Linear(self.front_end.width, dim),
            *(TimeBlock(dim) for _ in range(depth)),
            nn.LayerNorm(dim),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in classes.items()})

    def standardise(self, audio: Tensor) -> None:
        """Bring the network's input to mean 0 and deviation 1: before training, on some audio."""
        self.front_end.standardise(self.whole_hops(audio))

    def forward(self, audio: Tensor) -> Notes:
        """audio [B, samples] -> logits, T = samples / hop_length rounded up."""
        return self.read(self.front_end(self.whole_hops(audio)))

    def read(self, bands: Tensor) -> Notes:
        """The front end's bands [B, T, width] -> logits."""
        hidden = self.network(bands)
        return Notes(**{name: head(hidden) for name, head in self.heads.items()})

    def loss(self, audio: Tensor, labels: Notes) -> dict[str, Tensor]:
        """Cross-entropies in nats a frame, by name, and "loss", their sum.

        Args:
            audio: [B, samples].
            labels: [B, T] each.

        Raises:
            ValueError: labels that are not [B, T] int64 of the audio's T.
        """
        return self.losses_of(self(audio), labels)

    def losses_of(self, logits: Notes, labels: Notes) -> dict[str, Tensor]:
        """`loss` of logits that are there already."""
        losses = {}
        for name in self.heads:
            given, wanted = getattr(labels, name), getattr(logits, name)
            if given.shape != wanted.shape[:2] or given.dtype != torch.int64:
                raise ValueError(
                    f"labels of {name} are {given.dtype} {tuple(given.shape)}, "
                    f"wanted int64 {tuple(wanted.shape[:2])}"
                )
            losses[name] = F.cross_entropy(wanted.flatten(0, 1), given.flatten())
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def features(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> weighted square roots of the distributions [B, T, width]."""
        return self.distributions(self(audio))

    def distributions(self, logits: Notes) -> Tensor:
        """Logits as `features` gives them."""
        roots = [
            self.weights.get(name, 1.0) * getattr(logits, name).float().softmax(-1).sqrt()
            for name in self.heads
        ]
        return torch.cat(roots, dim=-1)
