"""MuLaN's attention: normalised queries and keys, so that scores cannot grow."""

import torch
from einops import rearrange
from torch import Tensor, nn

from musiclm_engine.attention.layer_norm import LayerNorm
from musiclm_engine.attention.position_bias import PositionBias, bias_arguments
from musiclm_kernels import biased_attention, qk_l2norm

ROUNDING_ROOM = 1.02  # two factors, each rounded to bfloat16's 8 bits


class CosineAttention(nn.Module):
    """Pre-norm self-attention with l2-normalised queries and keys and learned scales.

    Drop-in for `Attention` of musiclm-pytorch 0.2.8 (musiclm_pytorch.py): constructor, state-dict
    keys and numbers. One thing differs: a row whose keys are all masked attends to nothing, where
    upstream averages what is masked.

    Args:
        dim: width D of the input.
        causal: each token sees itself and those before it.
        dim_head: width of a head.
        heads: H.
        dropout: of the attention's probabilities, and again of the output.
        scale: of the cosines.
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        dim_head: int = 64,
        heads: int = 8,
        dropout: float = 0.0,
        scale: float = 8,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.causal = causal
        self.dropout = dropout
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
        rel_pos_bias: PositionBias | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D].

        Args:
            x: the input, not yet normalised.
            rel_pos_bias: a `PositionBias`, or upstream's tensor that broadcasts to [B, H, N, N]:
                exact too, but a value for every pair.
            mask: [B, N] bool, True where a token may be attended.

        Raises:
            ValueError: a bias that does not broadcast, or what `biased_attention` refuses (it
                calls the mask key_mask).
        """
        x = self.norm(x)
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(self.to_kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        q, k = qk_l2norm(q, k, self.q_scale, self.k_scale)
        out = biased_attention(
            q,
            k,
            v,
            **bias_arguments(rel_pos_bias, (*q.shape[:3], k.shape[2]), "rel_pos_bias"),
            causal=self.causal,
            key_mask=mask,
            scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
            score_bound=self._score_bound(),
        )
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    @torch.no_grad()
    def _score_bound(self) -> Tensor:
        """[H] float32: what scale * q k^T cannot exceed, with room for q and k being rounded."""
        largest = torch.linalg.vector_norm(self.q_scale * self.k_scale, torch.inf)
        return (largest.float() * (abs(self.scale) * ROUNDING_ROOM)).expand(self.heads)
