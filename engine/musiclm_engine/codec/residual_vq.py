"""The residual vector quantiser of the codecs: codes out, straight-through gradients back."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_kernels import rvq_decode, rvq_ema_update, rvq_encode


class ResidualVQ(nn.Module):
    """Q codebooks, each quantising what the ones before it left over (SoundStream, section III-C).

    Codebooks follow exponential moving averages of the vectors assigned to them, so they are
    buffers, not parameters. The first training batch initialises them. A code whose moving average
    of assigned vectors falls under `dead_share` of an even share is replaced by a vector of the
    batch. (SoundStream's threshold of 2 vectors presumes large batches: where a batch has fewer
    vectors than there are codes, it would replace every code at every step.)

    Args:
        dim: D, the width of a vector.
        num_quantizers: Q.
        codebook_size: K, codes in each codebook.
        decay: of the moving averages.
        dead_share: of an even share of a batch's vectors, below which a code counts as dead.
        quantizer_dropout: share of training rows that use a random prefix of the codebooks, so
            that one codec serves every bit rate (SoundStream, section III-C).
    """

    codebooks: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor
    updates: Tensor

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        decay: float = 0.99,
        dead_share: float = 0.1,
        quantizer_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.decay = decay
        self.dead_share = dead_share
        self.quantizer_dropout = quantizer_dropout
        self.register_buffer("codebooks", torch.zeros(num_quantizers, codebook_size, dim))
        self.register_buffer("cluster_size", torch.zeros(num_quantizers, codebook_size))
        self.register_buffer("cluster_sum", torch.zeros(num_quantizers, codebook_size, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise x, and in training move the codebooks.

        Args:
            x: [B, T, D].

        Returns:
            quantized [B, T, D] with x's gradient passed straight through; codes [B, T, Q], int64,
            -1 where quantizer dropout left a level out; the commitment loss, a scalar.
        """
        B, T, D = x.shape
        rows = x.detach().reshape(-1, D).float()
        if self.training and self.updates == 0:
            self._initialise(rows)
        codes, quantized = rvq_encode(
            rows, self.codebooks, mode="fast" if self.training else "exact"
        )
        if self.training:
            codes = self._drop_levels(codes.view(B, T, -1)).view(B * T, -1)
            quantized = rvq_decode(codes, self.codebooks)
            rvq_ema_update(
                rows,
                codes,
                self.codebooks,
                self.cluster_size,
                self.cluster_sum,
                decay=self.decay,
                dead_threshold=self.dead_share * self._even_share(rows),
                seed=int(self.updates),
            )
            self.updates += 1
        quantized = quantized.view(B, T, D).to(x.dtype)
        commitment = F.mse_loss(x, quantized)
        return x + (quantized - x).detach(), codes.view(B, T, -1), commitment

    def encode(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> codes [B, T, Q], int64."""
        B, T, D = x.shape
        codes, _ = rvq_encode(x.reshape(-1, D).float(), self.codebooks)
        return codes.view(B, T, -1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, T, q <= Q] -> the sum of their vectors [B, T, D]; -1 adds nothing."""
        B, T, Q = codes.shape
        return rvq_decode(codes.reshape(B * T, Q), self.codebooks[:Q]).view(B, T, -1)

    def _drop_levels(self, codes: Tensor) -> Tensor:
        B, _, Q = codes.shape
        kept = torch.where(
            torch.rand(B, device=codes.device) < self.quantizer_dropout,
            torch.randint(1, Q + 1, (B,), device=codes.device),
            Q,
        )
        dropped = torch.arange(Q, device=codes.device) >= kept[:, None]
        return codes.masked_fill(dropped[:, None], -1)

    def _initialise(self, rows: Tensor) -> None:
        """Fill each codebook with what random rows leave over at its level."""
        Q, K, _ = self.codebooks.shape
        residual = rows
        for q in range(Q):
            chosen = torch.randint(len(rows), (K,), device=rows.device)
            self.codebooks[q] = residual[chosen]
            quantized = rvq_encode(residual, self.codebooks[q : q + 1])[1]
            residual = residual - quantized
        self.cluster_size.fill_(self._even_share(rows))
        self.cluster_sum.copy_(self.codebooks * self._even_share(rows))

    def _even_share(self, rows: Tensor) -> float:
        return len(rows) / self.codebooks.shape[1]
