"""AudioLM's attention: many query heads, one head of keys and values."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from musiclm_engine.attention.layer_norm import GammaLayerNorm
from musiclm_engine.attention.position_bias import PositionBias, bias_arguments
from musiclm_kernels import biased_attention

# The output, then what was asked for of: the key-value cache, the values.
Result = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, tuple[Tensor, Tensor]]


class MultiQueryAttention(nn.Module):
    """Self- or cross-attention with one head of keys and values (arXiv 1911.02150).

    Drop-in for `Attention` of audiolm-pytorch 2.4.0 (audiolm_pytorch.py and attend.py):
    constructor, state-dict keys and numbers. As there, queries read the normalised input, but keys
    and values the input itself.

    What differs: a row whose keys are all masked attends to nothing, where upstream averages what
    is masked; `flash=True` is right with a cache, where upstream's new token sees the first key
    alone, and takes a bias; a bias goes with null keys, where upstream's shapes do not fit.

    Args:
        dim: width D of the input.
        causal: query i sees the keys j <= i + M - N.
        dim_head: width of a head; scores are divided by its root.
        dim_context: width of a context; None is `dim`.
        heads: H.
        norm_context: whether a context is normalised.
        num_null_kv: learned keys and values that are always seen.
        dropout: of the attention's probabilities, and again of the output.
        scale: without effect, as upstream.
        flash: without effect: there is one way to compute this, and it never holds all scores.
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        dim_head: int = 64,
        dim_context: int | None = None,
        heads: int = 8,
        norm_context: bool = False,
        num_null_kv: int = 0,
        dropout: float = 0.1,
        scale: float = 8,
        flash: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.num_null_kv = num_null_kv
        dim_context = dim if dim_context is None else dim_context
        self.norm = GammaLayerNorm(dim)
        self.context_norm = GammaLayerNorm(dim_context) if norm_context else nn.Identity()
        self.null_kv = (
            nn.Parameter(torch.randn(2, num_null_kv, dim_head)) if num_null_kv > 0 else None
        )
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim_context, dim_head * 2, bias=False)
        self.to_out = nn.Sequential(
            nn.Linear(heads * dim_head, dim, bias=False), nn.Dropout(dropout)
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        attn_bias: PositionBias | Tensor | None = None,
        prefix_context: Tensor | None = None,
        prefix_context_mask: Tensor | None = None,
        return_kv_cache: bool = False,
        return_values: bool = False,
        value_residual: Tensor | None = None,
        kv_cache: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Result:
        """x [B, N, D] -> [B, N, D].

        The keys stand in this order: null keys, prefix, cache, then the context or x.

        Args:
            x: the input, not yet normalised.
            context: [B, M, dim_context], read instead of x for keys and values.
            mask: [B, cached + M] bool, True where a key may be attended; not of null keys or
                the prefix.
            attn_bias: towards the cached keys and those after them: a `PositionBias`, or upstream's
                tensor that broadcasts to [B, H, N, cached + M], exact too, but a value for every
                pair. It is zero towards null keys and the prefix.
            prefix_context: [B, P, dim_context], P keys and values more, never normalised.
            prefix_context_mask: [B, P] bool as `mask`; None is all of them.
            return_kv_cache: return [2, B, cached + P + M, dim_head] keys and values too, for the
                next call's `kv_cache`.
            return_values: return the values [B, P + M, dim_head] too, before `value_residual`.
            value_residual: another layer's values, averaged with this one's.
            kv_cache: keys and values [2, B, cached, dim_head] before this call's.

        Returns:
            The output alone, (output, cache), (output, values) or (output, (cache, values)).

        Raises:
            ValueError: a kv_cache with a prefix_context (the cache holds its keys already), a
                prefix_context_mask without one, a bias that does not broadcast, or what
                `biased_attention` refuses (it calls the mask key_mask).
        """
        kv_input = x if context is None else self.context_norm(context)
        num_prefix = 0
        if prefix_context is not None:
            if kv_cache is not None:
                raise ValueError("kv_cache holds the keys of a prefix_context; want one of them")
            mask = _prefix_mask(prefix_context, prefix_context_mask, kv_input, mask)
            kv_input = torch.cat((prefix_context, kv_input), dim=1)
            num_prefix = prefix_context.shape[1]
        elif prefix_context_mask is not None:
            raise ValueError("prefix_context_mask is given without a prefix_context")

        q = rearrange(self.to_q(self.norm(x)), "b n (h d) -> b h n d", h=self.heads)
        k, values = self.to_kv(kv_input).chunk(2, dim=-1)
        v = values if value_residual is None else 0.5 * (values + value_residual)
        if kv_cache is not None:
            cached_k, cached_v = kv_cache
            k, v = torch.cat((cached_k, k), dim=1), torch.cat((cached_v, v), dim=1)
        new_cache = torch.stack((k, v)) if return_kv_cache else None
        num_biased = k.shape[1] - num_prefix
        if self.null_kv is not None:
            null_k, null_v = self.null_kv.to(k.dtype)[:, None].expand(-1, len(k), -1, -1)
            k, v = torch.cat((null_k, k), dim=1), torch.cat((null_v, v), dim=1)
            mask = None if mask is None else F.pad(mask, (self.num_null_kv, 0), value=True)

        out = biased_attention(
            q,
            k[:, None],
            v[:, None],
            **bias_arguments(
                attn_bias,
                (*q.shape[:3], num_biased),
                "attn_bias",
                num_unbiased_keys=self.num_null_kv + num_prefix,
            ),
            causal=self.causal,
            key_mask=mask,
            dropout=self.dropout if self.training else 0.0,
        )
        out = self.to_out(rearrange(out, "b h n d -> b n (h d)"))
        if new_cache is None:
            return (out, values) if return_values else out
        return (out, (new_cache, values)) if return_values else (out, new_cache)


def _prefix_mask(
    prefix: Tensor, prefix_mask: Tensor | None, kv_input: Tensor, mask: Tensor | None
) -> Tensor | None:
    """[B, P + M] bool, or None if neither part has a mask."""
    if prefix_mask is None and mask is None:
        return None
    if prefix_mask is None:
        prefix_mask = torch.ones(prefix.shape[:2], dtype=torch.bool, device=prefix.device)
    if mask is None:
        mask = torch.ones(kv_input.shape[:2], dtype=torch.bool, device=kv_input.device)
    return torch.cat((prefix_mask, mask), dim=1)
