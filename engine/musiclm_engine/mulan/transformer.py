"""The transformer block that both MuLaN towers share."""

import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_engine.attention import CosineAttention, PositionBias
from musiclm_engine.attention.layer_norm import LayerNorm


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
                    CosineAttention(dim, dim_head=dim_head, heads=heads, dropout=attn_dropout),
                    feed_forward(dim, ff_mult, ff_dropout),
                ]
            )
            for _ in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        *,
        position_bias: PositionBias | None = None,
        key_mask: Tensor | None = None,
        return_all_layers: bool = False,
    ) -> Tensor | list[Tensor]:
        """x [B, N, D] -> [B, N, D], or a list of what each block gives, the last one's last.

        key_mask: [B, N] bool, True where a token may be attended.
        """
        outputs = []
        for block in self.layers:
            attention, feed_forward = block.children()
            x = x + attention(x, position_bias, key_mask)
            x = x + feed_forward(x)
            if return_all_layers:
                outputs.append(x)
        return outputs if return_all_layers else x
