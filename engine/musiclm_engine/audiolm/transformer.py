"""The decoder-only transformer that all three stages share."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_kernels import biased_attention

Store = Callable[[int, Tensor, Tensor], None]  # takes a layer's number, keys and values


class Attention(nn.Module):
    """Causal multi-head self-attention with a relative bias read from a table."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        table: Tensor,
        offset: int,
        q_codes: Tensor,
        k_codes: Tensor,
        store: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; store: called with the keys and values, both [B, H, N, d]."""
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        if store is not None:
            store(k, v)
        out = biased_attention(
            q, k, v, table=table, q_codes=q_codes, k_codes=k_codes, offset=offset, causal=True
        )
        return self.dropout(self.to_out(rearrange(out, "b h n d -> b n (h d)")))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between; gated: half of it times the GELU of the other half
    (GEGLU, arXiv 2002.05202)."""

    def __init__(self, dim: int, ff_mult: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.gated = gated
        self.norm = nn.LayerNorm(dim, bias=False)
        self.expand = nn.Linear(dim, (1 + gated) * ff_mult * dim, bias=False)
        self.contract = nn.Linear(ff_mult * dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(self.norm(x))
        if self.gated:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * F.gelu(gate)
        else:
            hidden = F.gelu(hidden)
        return self.dropout(self.contract(hidden))


class Layer(nn.Module):
    """Attention and feed-forward, each added to what it read."""

    def __init__(self, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """x [B, N, D] -> [B, N, D]; attention: see `Attention.forward`."""
        x = x + self.attention(x, **attention)
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Pre-norm decoder (AudioLM, arXiv 2209.03143, section III-B; sizes are the caller's)."""

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        ff_mult: int,
        ff_gated: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.layers = nn.ModuleList(
            Layer(
                Attention(dim, heads, dim_head, dropout),
                FeedForward(dim, ff_mult, ff_gated, dropout),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        for layer in self.typed_layers():  # the residual sum keeps its scale
            for last in (layer.attention.to_out, layer.feed_forward.contract):
                nn.init.normal_(last.weight, std=0.02 / (2 * depth) ** 0.5)

    def typed_layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def forward(
        self,
        x: Tensor,
        *,
        table: Tensor,
        offset: int,
        q_codes: Tensor,
        k_codes: Tensor,
        store: Store | None = None,
    ) -> Tensor:
        """All tokens at once.

        Args:
            x: [B, N, D] embeddings.
            table, offset: the bias, see `TimeLevelBias`.
            q_codes, k_codes: [1 or B, N] int32 position codes.
            store: called with each layer's number, keys and values, both [B, H, N, d].

        Returns:
            [B, N, D], normalised.
        """
        for number, layer in enumerate(self.typed_layers()):
            x = layer(
                x,
                table=table,
                offset=offset,
                q_codes=q_codes,
                k_codes=k_codes,
                store=None if store is None else partial(store, number),
            )
        return self.norm(x)
