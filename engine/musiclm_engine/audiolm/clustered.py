"""Tokens that number the clusters of a frame's features."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.kmeans import kmeans
from musiclm_kernels import rvq_encode


class ClusteredTokens(nn.Module):
    """Audio to one token a frame: features, their principal components, the nearest centroid.

    A subclass says what the features are.

    Args:
        width: of the features.
        num_components: D, principal components that are kept.
        num_tokens: K, clusters.
        sample_rate_hz: of the audio.
        hop_length: samples a token stands for.

    Raises:
        ValueError: more components than the features are wide.
    """

    mean: Tensor
    components: Tensor
    centroids: Tensor
    config: dict[str, Any]

    def __init__(
        self,
        *,
        width: int,
        num_components: int,
        num_tokens: int,
        sample_rate_hz: int,
        hop_length: int,
    ) -> None:
        super().__init__()
        if not 1 <= num_components <= width:
            raise ValueError(
                f"num_components is {num_components}, wanted 1 to {width}, the width of the features"
            )
        self.num_tokens = num_tokens
        self.sample_rate_hz = sample_rate_hz
        self.hop_length = hop_length
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.zeros(width, num_components))
        self.register_buffer("centroids", torch.zeros(num_tokens, num_components))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**config)

    def features(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> [B, T, width], T = samples / hop_length rounded up.

        Raises:
            ValueError: audio that is not [B, samples >= 1].
        """
        raise NotImplementedError

    def whole_hops(self, audio: Tensor) -> Tensor:
        """Audio [B, samples] with silence up to a whole number of hops."""
        if audio.dim() != 2 or audio.shape[1] == 0:
            raise ValueError(f"audio is {tuple(audio.shape)}, wanted [batch, samples >= 1]")
        return F.pad(audio, (0, -audio.shape[1] % self.hop_length))

    @torch.no_grad()
    def fit(self, features: Tensor, *, seed: int) -> None:
        """Find components and clusters.

        Args:
            features: [N, width], of many clips.
            seed: of k-means.

        Raises:
            ValueError: fewer features than tokens or components.
        """
        num_components = self.components.shape[1]
        if len(features) < num_components:
            raise ValueError(f"features are {len(features)}, {num_components} components want more")
        mean = features.mean(0)
        _, _, directions = torch.linalg.svd((features - mean)[: 1 << 16], full_matrices=False)
        # A copy in the buffer's layout: the product below rounds as encode's does.
        components = directions[:num_components].T.clone(memory_format=torch.contiguous_format)
        centroids = kmeans((features - mean) @ components, self.num_tokens, seed=seed)
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.centroids.copy_(centroids)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """audio [B, samples] -> tokens [B, T] int64, the same under autocast."""
        if not self.components.any():
            raise RuntimeError("the semantic tokenizer is not fitted: call fit() or load one")
        with torch.autocast(audio.device.type, enabled=False):
            features = (self.features(audio) - self.mean) @ self.components
            tokens, _ = rvq_encode(features.flatten(0, 1), self.centroids[None])
        return tokens.view(features.shape[:2])
