"""MuLaN embeddings as discrete conditioning tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from musiclm_engine.quantize import Batches, ResidualVQ
from musiclm_kernels import rvq_encode


class MuLaNEmbedQuantizer(nn.Module):
    """Residual vector quantiser of embeddings, fitted once over a whole data set.

    MusicLM's 12 tokens a clip (arXiv 2301.11325, section 3.2). Fit it before use, on embeddings of
    many clips; the fitted codebooks are part of the state dict.

    Args:
        dim: D of the embeddings.
        num_quantizers: Q, tokens an embedding.
        codebook_size: K, codes a level.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, dim: int = 128, num_quantizers: int = 12, codebook_size: int = 1024):
        super().__init__()
        self.dim = dim
        self.num_quantizers = num_quantizers
        self.codebook_size = codebook_size
        self.rq = ResidualVQ(
            dim=dim,
            num_quantizers=num_quantizers,
            codebook_size=codebook_size,
            decay=0.9,
            commitment_weight=0.0,
            kmeans_init=True,
            threshold_ema_dead_code=2,
        )

    @property
    def codebooks(self) -> Tensor:
        """[Q, K, D]."""
        return self.rq.codebooks

    @property
    def is_fitted(self) -> bool:
        return self.rq.is_initialised

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return {
            "dim": self.dim,
            "num_quantizers": self.num_quantizers,
            "codebook_size": self.codebook_size,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MuLaNEmbedQuantizer":
        """A quantiser of this shape, not fitted."""
        return cls(**config)

    def fit(self, embeddings: Batches, *, seed: int, iterations: int = 20) -> None:
        """Residual k-means: each level is fitted to what the levels before it left over.

        Args:
            embeddings: (N, D) with N >= codebook_size, better 50 times that, or a function that
                gives them in batches, from the start at each call; all of the data set.
            seed: chooses the starting rows and replacements.
            iterations: Lloyd steps a level.

        Raises:
            ValueError: embeddings that are not (N, D) or not finite, fewer of them than codes, or
                other ones at the next call; iterations below 1.
        """
        self.rq.fit(embeddings, seed=seed, iterations=iterations)

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) -> codes (B, Q) int64, the nearest code of each level in turn.

        Raises:
            RuntimeError: not fitted.
            ValueError: embeddings that are not (B, D).
        """
        self._refuse_unfitted()
        self._check(embeddings)
        return rvq_encode(embeddings.to(self.codebooks), self.codebooks)[0]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, Q) -> their sum (B, D) float32; a code of -1 adds nothing.

        Raises:
            RuntimeError: not fitted.
            ValueError: codes that are not integers of shape (B, Q).
        """
        self._refuse_unfitted()
        if codes.ndim != 2 or codes.shape[1] != self.num_quantizers or codes.is_floating_point():
            raise ValueError(
                f"codes is {codes.dtype} of shape {tuple(codes.shape)}; "
                f"want integers of shape (B, {self.num_quantizers})"
            )
        return self.rq.get_output_from_indices(codes.to(self.codebooks.device))

    forward = encode

    def _check(self, embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)}; want (B, {self.dim})"
            )

    def _refuse_unfitted(self) -> None:
        if not self.is_fitted:
            raise RuntimeError(
                "this MuLaNEmbedQuantizer holds no codebooks yet: call fit(embeddings, seed=...) on "
                "the embeddings of a data set, or load_state_dict of a fitted one"
            )
