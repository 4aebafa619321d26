"""MuLaN's text tower: a transformer over caption tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_engine.attention.layer_norm import LayerNorm
from musiclm_engine.mulan.transformer import Transformer


class TextTransformer(nn.Module):
    """Token ids -> one embedding, read at a cls token (MuLan, arXiv 2208.12415, section 4.2).

    Args:
        dim: width D.
        depth: number of blocks.
        num_tokens: V, size of the vocabulary, padding included.
        max_seq_len: longest caption in tokens.
        dim_head, heads: of the attention.
        attn_dropout: dropout of the attention's probabilities, and again of its output.
        ff_mult, ff_dropout: of the feed-forward.
        pad_id: the token that is not attended to; stands for nothing else.

    Raises:
        ValueError: a size below 1 or a `pad_id` outside the vocabulary.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        num_tokens: int,
        max_seq_len: int = 128,
        dim_head: int = 64,
        heads: int = 8,
        attn_dropout: float = 0.0,
        ff_mult: float = 4,
        ff_dropout: float = 0.0,
        pad_id: int = 0,
    ):
        super().__init__()
        for name, size in (("dim", dim), ("depth", depth), ("max_seq_len", max_seq_len)):
            if size < 1:
                raise ValueError(f"{name}={size}; want at least 1")
        if not 0 <= pad_id < num_tokens:
            raise ValueError(f"pad_id={pad_id} is not among num_tokens={num_tokens}")
        self._config = {
            "dim": dim,
            "depth": depth,
            "num_tokens": num_tokens,
            "max_seq_len": max_seq_len,
            "dim_head": dim_head,
            "heads": heads,
            "attn_dropout": attn_dropout,
            "ff_mult": ff_mult,
            "ff_dropout": ff_dropout,
            "pad_id": pad_id,
        }
        self.dim = dim
        self.depth = depth
        self.num_tokens = num_tokens
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.cls_token = nn.Parameter(torch.randn(dim))
        self.transformer = Transformer(
            dim,
            depth,
            dim_head=dim_head,
            heads=heads,
            attn_dropout=attn_dropout,
            ff_mult=ff_mult,
            ff_dropout=ff_dropout,
        )
        self.norm = LayerNorm(dim)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextTransformer":
        """A tower of this shape with random weights."""
        return cls(**config)

    def forward(
        self, ids: Tensor, *, return_all_layers: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds captions.

        Args:
            ids: (B, T) int64 with T <= max_seq_len; `pad_id` fills up the shorter rows, and how
                many of them there are changes nothing.
            return_all_layers: give what each block makes of the cls token, too.

        Returns:
            (B, dim); not l2-normalised. With `return_all_layers` also (depth, B, dim), the last
            block's last, before the final norm.

        Raises:
            ValueError: ids that are not integers of shape (B, T), or T > max_seq_len.
        """
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(
                f"ids is {ids.dtype} of shape {tuple(ids.shape)}; want integers of shape (B, T)"
            )
        if ids.shape[1] > self.max_seq_len:
            raise ValueError(f"ids has {ids.shape[1]} tokens; want at most {self.max_seq_len}")
        x = self.token_emb(ids) + self.pos_emb.weight[: ids.shape[1]]
        x = torch.cat((self.cls_token.expand(len(ids), 1, -1), x), dim=1)
        mask = F.pad(ids != self.pad_id, (1, 0), value=True)
        outputs = self.transformer(x, key_mask=mask, return_all_layers=return_all_layers)
        if not return_all_layers:
            return self.norm(outputs[:, 0])
        layers = torch.stack([x[:, 0] for x in outputs])
        return self.norm(layers[-1]), layers
