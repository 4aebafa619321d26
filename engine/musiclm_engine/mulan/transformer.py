"""The transformer block that both MuLaN towers share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_kernels import biased_attention

QK_SCALE = 8.0  # of normalised queries and keys: cosine logits within [-8, 8] at the start


class LayerNorm(nn.Module):
    """Layer norm with a gain and no bias."""

    def __init__(self, dim: int):
        super().__init__()
        self.learned_gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.learned_gamma)


class GEGLU(nn.Module):
    """value * gelu(gate) (Shazeer, arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


def feed_forward(dim: int, mult: float = 4, dropout: float = 0.0) -> nn.Sequential:
    """Pre-norm GEGLU feed-forward; two thirds of `mult`, so that it has a plain one's weights."""
    dim_hidden = int(dim * mult * 2 / 3)
    return nn.Sequential(
        LayerNorm(dim),
        nn.Linear(dim, dim_hidden * 2, bias=False),
        GEGLU(),
        nn.Dropout(dropout),
        nn.Linear(dim_hidden, dim, bias=False),
    )


class Attention(nn.Module):
    """Pre-norm self-attention with l2-normalised queries and keys and learned scales.

    `dropout` acts on the output: attention is one operation that keeps its probabilities to itself.
    """

    def __init__(self, dim: int, *, dim_head: int = 64, heads: int = 8, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, heads * dim_head * 2, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Sequential(
            nn.Linear(heads * dim_head, dim, bias=False), nn.Dropout(dropout)
        )

    def forward(
        self,
        x: Tensor,
        *,
        table: Tensor | None = None,
        codes: Tensor | None = None,
        offset: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.norm(x)
        key, value = self.to_kv(x).chunk(2, dim=-1)
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), key, value)
        )  # [B, H, N, dim_head]
        query = F.normalize(query, dim=-1) * self.q_scale
        key = F.normalize(key, dim=-1) * self.k_scale
        out = biased_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            table=table,
            q_codes=codes,
            k_codes=codes,
            offset=offset,
            key_mask=key_mask,
            scale=QK_SCALE,
        )
        return self.to_out(out.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """`depth` pre-norm blocks without a final norm; one bias table serves every layer."""

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Attention(dim, dim_head=dim_head, heads=heads, dropout=attn_dropout),
                    feed_forward(dim, ff_mult, ff_dropout),
                ]
            )
            for _ in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        *,
        table: Tensor | None = None,
        codes: Tensor | None = None,
        offset: int = 0,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D); the rest as in `musiclm_kernels.biased_attention`."""
        for block in self.layers:
            attention, feed_forward = block.children()
            x = x + attention(x, table=table, codes=codes, offset=offset, key_mask=key_mask)
            x = x + feed_forward(x)
        return x
