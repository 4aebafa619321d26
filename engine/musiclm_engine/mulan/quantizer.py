"""MuLaN embeddings as discrete conditioning tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from musiclm_engine.kmeans import kmeans
from musiclm_kernels import rvq_decode, rvq_encode

MAX_ROWS = 16384  # encoded at a time: bounds the memory of the distances


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

    codebooks: Tensor
    is_fitted: Tensor

    def __init__(self, dim: int = 128, num_quantizers: int = 12, codebook_size: int = 1024):
        super().__init__()
        if min(dim, num_quantizers, codebook_size) < 1:
            raise ValueError(
                f"dim={dim}, num_quantizers={num_quantizers}, codebook_size={codebook_size}; "
                "want each at least 1"
            )
        self.dim = dim
        self.num_quantizers = num_quantizers
        self.codebook_size = codebook_size
        self.register_buffer("codebooks", torch.zeros(num_quantizers, codebook_size, dim))
        self.register_buffer("is_fitted", torch.tensor(False))

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

    @torch.no_grad()
    def fit(self, embeddings: Tensor, *, seed: int, iterations: int = 20) -> None:
        """Residual k-means: each level is fitted to what the levels before it left over.

        Starts from rows drawn without repetition; a code that no row chooses moves to a random
        row.

        Args:
            embeddings: (N, D) with N >= codebook_size; all of the data set that you can hold.
            seed: chooses the starting rows and replacements.
            iterations: Lloyd steps a level.

        Raises:
            ValueError: embeddings that are not (N, D) or not finite, fewer of them than codes, or
                iterations below 1.
        """
        self._check(embeddings)
        if len(embeddings) < self.codebook_size:
            raise ValueError(
                f"embeddings has {len(embeddings)} rows for {self.codebook_size} codes; want at "
                f"least {self.codebook_size} rows, better 50 times that, or a smaller codebook_size"
            )
        if iterations < 1:
            raise ValueError(f"iterations={iterations}; want at least 1")
        residual = embeddings.to(self.codebooks)
        if not bool(torch.isfinite(residual).all()):
            raise ValueError("embeddings holds values that are not finite (nan or inf)")
        for level in range(self.num_quantizers):
            codebook = kmeans(
                residual, self.codebook_size, seed=seed + level, iterations=iterations
            )
            residual = residual - rvq_decode(_encode(residual, codebook[None]), codebook[None])
            self.codebooks[level] = codebook
        self.is_fitted.fill_(True)

    @torch.no_grad()
    def encode(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, D) -> codes (B, Q) int64, the nearest code of each level in turn.

        Raises:
            RuntimeError: not fitted.
            ValueError: embeddings that are not (B, D).
        """
        self._refuse_unfitted()
        self._check(embeddings)
        return _encode(embeddings.to(self.codebooks), self.codebooks)

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
        return rvq_decode(codes.to(self.codebooks.device), self.codebooks)

    forward = encode

    def _check(self, embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(
                f"embeddings has shape {tuple(embeddings.shape)}; want (B, {self.dim})"
            )

    def _refuse_unfitted(self) -> None:
        if not bool(self.is_fitted):
            raise RuntimeError(
                "this MuLaNEmbedQuantizer holds no codebooks yet: call fit(embeddings, seed=...) on "
                "the embeddings of a data set, or load_state_dict of a fitted one"
            )


def _encode(x: Tensor, codebooks: Tensor) -> Tensor:
    return torch.cat([rvq_encode(rows, codebooks)[0] for rows in x.split(MAX_ROWS)])
