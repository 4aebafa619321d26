"""T5's attention: unscaled scores and a bucketed position bias."""

from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from musiclm_engine.attention.position_bias import PositionBias, bias_arguments, in_four_dimensions
from musiclm_engine.attention.t5_position import T5PositionBias
from musiclm_kernels import biased_attention


class T5Config(Protocol):
    """What is read of transformers' `T5Config`."""

    d_model: int
    d_kv: int
    num_heads: int
    dropout_rate: float
    is_decoder: bool
    relative_attention_num_buckets: int
    relative_attention_max_distance: int


class T5Attention(nn.Module):
    """Self- or cross-attention of T5 (arXiv 1910.10683, section 2.1).

    Drop-in for `T5Attention` of transformers 5 (models/t5/modeling_t5.py): constructor, state-dict
    keys, and the numbers of its "sdpa" implementation. What it returns for the next layer is a
    `PositionBias`, not a value for every pair; weights are never returned.

    Args:
        config: transformers' `T5Config`, or anything with the attributes read here.
        has_relative_attention_bias: whether this layer makes the position bias, for all layers.
        layer_idx: without effect: it finds the layer's place in a cache.
        is_causal: without a mask, each token sees itself and those before it.
    """

    def __init__(
        self,
        config: T5Config,
        has_relative_attention_bias: bool = False,
        layer_idx: int | None = None,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.n_heads = config.num_heads
        self.dropout = config.dropout_rate
        self.is_causal = is_causal
        self.has_relative_attention_bias = has_relative_attention_bias
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = T5PositionBias(
                config.num_heads,
                num_buckets=config.relative_attention_num_buckets,
                max_distance=config.relative_attention_max_distance,
                bidirectional=not config.is_decoder,
            )

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: PositionBias | Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, PositionBias | Tensor | None, None]:
        """hidden_states [B, N, d_model] -> the same.

        Args:
            hidden_states: what queries read, and keys and values without `key_value_states`.
            mask: None; [B or 1, 1, 1, M] bool, True where a key may be attended; or bool or added
                values that broadcast to [B, H, N, M], exact too, but a value for every pair.
            key_value_states: [B, M, d_model], for cross-attention.
            position_bias: what the first layer returned, or upstream's tensor [1, H, N, M].
            past_key_values: refused; nor does `kwargs` take anything that is set.

        Returns:
            The output, the position bias for the next layer (None without one), and None where
            upstream has the weights.

        Raises:
            ValueError: an argument that is refused, named; or a bias or mask that does not
                broadcast to the scores.
        """
        refused = {"past_key_values": past_key_values, **kwargs}
        for name, value in refused.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported; want None or False")
        sources = hidden_states if key_value_states is None else key_value_states
        q = self._heads(self.q(hidden_states))
        k, v = self._heads(self.k(sources)), self._heads(self.v(sources))
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.relative_attention_bias.position_bias(
                q.shape[2], k.shape[2], first_query=0
            )
        like = (*q.shape[:3], k.shape[2])
        bias, key_mask = position_bias, None
        if mask is not None:
            mask = in_four_dimensions(mask, like, "mask")
            if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
                key_mask = mask[:, 0, 0].expand(like[0], like[3])
            else:
                bias = _with_mask(position_bias, mask, like)
        out = biased_attention(
            q,
            k,
            v,
            **bias_arguments(bias, like, "position_bias"),
            causal=self.is_causal and mask is None,
            key_mask=key_mask,
            scale=1.0,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o(rearrange(out, "b h n d -> b n (h d)")), position_bias, None

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.n_heads)


def _with_mask(
    position_bias: PositionBias | Tensor | None, mask: Tensor, like: tuple[int, int, int, int]
) -> Tensor:
    """The two added, for every pair."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    if position_bias is None:
        return mask
    if isinstance(position_bias, PositionBias):
        return position_bias.dense() + mask
    return in_four_dimensions(position_bias, like, "position_bias") + mask
