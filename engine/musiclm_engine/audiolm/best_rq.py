"""Semantic tokens from masked prediction: BEST-RQ (Chiu et al., arXiv 2202.01855).

Each frame gets a label that nobody learns: a random projection of what is heard, and the number of
the random codebook vector that it points along. Spans of frames are replaced by noise, and a
transformer is to name the labels that were there. What its middle layer makes of unmasked audio is
then clustered, as AudioLM does with w2v-BERT's.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.attention import CosineAttention, PositionBias, T5PositionBias
from musiclm_engine.audiolm.bands import FrontEnd
from musiclm_engine.audiolm.clustered import ClusteredTokens
from musiclm_engine.audiolm.transformer import FeedForward


class RandomProjectionLabels(nn.Module):
    """The codebook vector nearest to a random projection, both of length 1; nothing is trained.

    Args:
        width: of the input.
        dim: of the projection.
        codebook_size: labels.
        seed: of the projection (Xavier's uniform) and the codebook (normal), section 3.1.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, width: int, *, dim: int, codebook_size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = (6 / (width + dim)) ** 0.5
        projection = bound * (2 * torch.rand(width, dim, generator=generator) - 1)
        codebook = torch.randn(codebook_size, dim, generator=generator)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(codebook, dim=-1))

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """frames [..., width] -> labels [...] int64, in float32 under autocast too."""
        with torch.autocast(frames.device.type, enabled=False):
            # Of vectors of length 1 the nearest has the largest product, at any length of the other.
            return (frames.float() @ self.projection @ self.codebook.T).argmax(-1)


def span_mask(
    batch: int, frames: int, *, probability: float, span: int, device: torch.device
) -> Tensor:
    """bool [batch, frames]: each frame begins a masked span with this probability; spans overlap.

    A share of 1 - (1 - probability) ** span is masked, less at the first frames, which fewer
    spans reach.
    """
    starts = (torch.rand(batch, frames, device=device) < probability).float()
    reached = F.max_pool1d(F.pad(starts, (span - 1, 0))[:, None], span, stride=1)
    return reached[:, 0] > 0


class Block(nn.Module):
    """Attention in both directions and a GEGLU feed-forward, each added to what it read."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = CosineAttention(dim, dim_head=dim // heads, heads=heads)
        self.feed_forward = FeedForward(dim, ff_mult=2, gated=True, dropout=0.0)

    def forward(self, x: Tensor, bias: PositionBias) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.attention(x, bias)
        return x + self.feed_forward(x)


class BestRQTokenizer(ClusteredTokens):
    """Audio to one token a frame; `loss` trains the encoder, then `fit` finds the clusters.

    A frame sees all others, before and after it.

    Args:
        num_tokens: K, clusters.
        num_components: D, principal components of the features that are kept.
        sample_rate_hz: of the audio.
        hop_length: samples a token stands for.
        dim: width of the encoder.
        depth: its blocks.
        heads: of attention, that divide `dim`.
        feature_layer: the block whose output is clustered, from 1.
        label_dim, label_size, label_seed: see `RandomProjectionLabels`.
        mask_probability, mask_span: see `span_mask`; the paper masks spans of 400 ms.
        mask_noise: deviation of what stands in masked frames.

    Raises:
        ValueError: a feature_layer that is not in 1 .. depth, or heads that do not divide dim.
    """

    def __init__(
        self,
        *,
        num_tokens: int = 1024,
        num_components: int = 64,
        sample_rate_hz: int = 16000,
        hop_length: int = 640,
        dim: int = 192,
        depth: int = 6,
        heads: int = 4,
        feature_layer: int = 4,
        label_dim: int = 16,
        label_size: int = 2048,
        label_seed: int = 0,
        mask_probability: float = 0.04,
        mask_span: int = 10,
        mask_noise: float = 0.1,
    ) -> None:
        if not 1 <= feature_layer <= depth:
            raise ValueError(f"feature_layer is {feature_layer}, wanted 1 to depth = {depth}")
        if dim % heads:
            raise ValueError(f"heads is {heads}, wanted a divisor of dim = {dim}")
        super().__init__(
            width=dim,
            num_components=num_components,
            num_tokens=num_tokens,
            sample_rate_hz=sample_rate_hz,
            hop_length=hop_length,
        )
        self.config = {
            "num_tokens": num_tokens,
            "num_components": num_components,
            "sample_rate_hz": sample_rate_hz,
            "hop_length": hop_length,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "feature_layer": feature_layer,
            "label_dim": label_dim,
            "label_size": label_size,
            "label_seed": label_seed,
            "mask_probability": mask_probability,
            "mask_span": mask_span,
            "mask_noise": mask_noise,
        }
        self.feature_layer = feature_layer
        self.mask_probability = mask_probability
        self.mask_span = mask_span
        self.mask_noise = mask_noise
        self.front_end = FrontEnd(sample_rate_hz=sample_rate_hz, hop_length=hop_length)
        self.labels = RandomProjectionLabels(
            self.front_end.width, dim=label_dim, codebook_size=label_size, seed=label_seed
        )
        self.to_hidden = nn.Linear(self.front_end.width, dim)
        self.position = T5PositionBias(heads, max_distance=256)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.to_labels = nn.Linear(dim, label_size)

    def standardise(self, audio: Tensor) -> None:
        """Bring the frames to mean 0 and deviation 1: before training, on some audio."""
        self.front_end.standardise(self.whole_hops(audio))

    def loss(self, audio: Tensor) -> dict[str, Tensor]:
        """ "loss", the cross-entropy in nats of the labels of masked frames, of audio [B, samples];
        "accuracy", how many of them are named right; "masked", their share of all frames.

        What is masked and with which noise is drawn from torch's generator.
        """
        return self.loss_of(self.front_end(self.whole_hops(audio)))

    def loss_of(self, frames: Tensor) -> dict[str, Tensor]:
        """`loss` of the front end's frames [B, T, width]."""
        labels = self.labels(frames)
        masked = span_mask(
            *labels.shape,
            probability=self.mask_probability,
            span=self.mask_span,
            device=frames.device,
        )
        noise = self.mask_noise * torch.randn_like(frames)
        hidden = self._hidden(torch.where(masked[..., None], noise, frames), len(self.blocks))
        logits = self.to_labels(self.norm(hidden))
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        count = masked.sum().clamp_min(1)
        right = (logits.argmax(-1) == labels) & masked
        return {
            "loss": (nats * masked).sum() / count,
            "accuracy": right.sum() / count,
            "masked": masked.float().mean(),
        }

    @torch.no_grad()
    def features(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> the feature layer's output, normalised, [B, T, dim]."""
        return self.features_of(self.front_end(self.whole_hops(audio)))

    def features_of(self, frames: Tensor) -> Tensor:
        """`features` of the front end's frames [B, T, width]."""
        hidden = self._hidden(frames, self.feature_layer).float()
        return F.layer_norm(hidden, hidden.shape[-1:])

    def _hidden(self, frames: Tensor, depth: int) -> Tensor:
        """frames [B, T, width] -> the output [B, T, D] of the block of this number."""
        length = frames.shape[1]
        bias = self.position.position_bias(length, length)
        x = self.to_hidden(frames)
        for block in cast(list[Block], list(self.blocks)[:depth]):
            x = block(x, bias)
        return x
