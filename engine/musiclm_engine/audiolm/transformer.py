"""The decoder-only transformer that all three stages share."""

from typing import Any, cast

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.audiolm.cache import KVCache
from musiclm_kernels import biased_attention, decode_attention


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
        cache: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; cache: the slots [B, H, N, D] where keys and values go."""
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        if cache is not None:
            cache[0].copy_(k)
            cache[1].copy_(v)
        out = biased_attention(
            q, k, v, table=table, q_codes=q_codes, k_codes=k_codes, offset=offset, causal=True
        )
        return self.dropout(self.to_out(rearrange(out, "b h n d -> b n (h d)")))

    def step(
        self, x: Tensor, *, table: Tensor, offset: int, q_code: Tensor, cache: KVCache, layer: int
    ) -> Tensor:
        """One token a row: x [B, D] -> [B, D]; writes the cache's newest slot."""
        q, k, v = rearrange(
            self.to_qkv(self.norm(x)), "b (three h d) -> three b h d", three=3, h=self.heads
        )
        cache.keys[layer, :, :, cache.length - 1] = k
        cache.values[layer, :, :, cache.length - 1] = v
        out = decode_attention(
            q,
            cache.keys[layer],
            cache.values[layer],
            cache.lengths,
            table=table,
            q_code=q_code,
            k_codes=cache.codes,
            offset=offset,
        )
        return self.to_out(rearrange(out, "b h d -> b (h d)"))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, dim: int, ff_mult: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.expand = nn.Linear(dim, ff_mult * dim, bias=False)
        self.contract = nn.Linear(ff_mult * dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(F.gelu(self.expand(self.norm(x)))))


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

    def step(self, x: Tensor, **attention: Any) -> Tensor:
        """x [B, D] -> [B, D]; attention: see `Attention.step`."""
        x = x + self.attention.step(x, **attention)
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Pre-norm decoder (AudioLM, arXiv 2209.03143, section III-B; sizes are the caller's)."""

    def __init__(
        self, *, dim: int, depth: int, heads: int, dim_head: int, ff_mult: int, dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.layers = nn.ModuleList(
            Layer(Attention(dim, heads, dim_head, dropout), FeedForward(dim, ff_mult, dropout))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        for layer in self._layers():  # the residual sum keeps its scale
            for last in (layer.attention.to_out, layer.feed_forward.contract):
                nn.init.normal_(last.weight, std=0.02 / (2 * depth) ** 0.5)

    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def new_cache(self, batch: int, slots: int, like: Tensor) -> KVCache:
        return KVCache(
            layers=len(self.layers),
            batch=batch,
            heads=self.heads,
            slots=slots,
            dim_head=self.dim_head,
            device=like.device,
            dtype=like.dtype,
        )

    def forward(
        self,
        x: Tensor,
        *,
        table: Tensor,
        offset: int,
        q_codes: Tensor,
        k_codes: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """All tokens of an empty cache's sequence at once.

        Args:
            x: [B, N, D] embeddings.
            table, offset: the bias, see `TimeLevelBias`.
            q_codes, k_codes: [N] int32 position codes.
            cache: filled with the N keys and values if given.

        Returns:
            [B, N, D], normalised.
        """
        slots = cache.extend(k_codes) if cache is not None else None
        for number, layer in enumerate(self._layers()):
            store = None
            if cache is not None:
                store = (cache.keys[number, :, :, slots], cache.values[number, :, :, slots])
            x = layer(
                x,
                table=table,
                offset=offset,
                q_codes=q_codes[None],
                k_codes=k_codes[None],
                cache=store,
            )
        return self.norm(x)

    def step(
        self,
        x: Tensor,
        *,
        table: Tensor,
        offset: int,
        q_code: Tensor,
        k_code: Tensor,
        cache: KVCache,
    ) -> Tensor:
        """One more token a row: x [B, D] with codes [1] -> [B, D], normalised."""
        cache.extend(k_code)
        q_code = q_code.expand(len(x))
        for number, layer in enumerate(self._layers()):
            x = layer.step(x, table=table, offset=offset, q_code=q_code, cache=cache, layer=number)
        return self.norm(x)
