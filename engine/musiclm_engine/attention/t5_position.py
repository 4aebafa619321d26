"""T5's position bias: distances share buckets, and each bucket has a learned bias."""

import math

import torch
from torch import Tensor, nn

from musiclm_engine.attention.line import distances, line_bias
from musiclm_engine.attention.position_bias import PositionBias


def t5_bucket(
    distance: Tensor, *, num_buckets: int, max_distance: int, bidirectional: bool = True
) -> Tensor:
    """int64 buckets of distances query - key: near ones have one each, far ones logarithmic ones.

    The same buckets as transformers' `T5Attention._relative_position_bucket`, whose argument is
    key - query (arXiv 1910.10683, section 2.1).

    Args:
        distance: integers of any shape.
        num_buckets: of both directions together; half of one direction's are exact.
        max_distance: where the logarithmic buckets end; all beyond share the last one.
        bidirectional: keys after the query have the second half of the buckets; else they all
            share bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        first = num_buckets * (distance < 0)
        distance = distance.abs()
    else:
        first = torch.zeros_like(distance)
        distance = distance.clamp_min(0)
    exact = num_buckets // 2
    ratio = (distance.clamp_min(1) / exact).log() / math.log(max_distance / exact)
    logarithmic = (exact + (ratio * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
    return first + torch.where(distance < exact, distance, logarithmic)


class T5PositionBias(nn.Embedding):
    """A learned bias for each bucket and head.

    Drop-in for what transformers' `T5Attention` registers as `relative_attention_bias`: the same
    key, weight [num_buckets, H], and called with buckets it gives their biases.

    Args:
        heads: H.
        num_buckets, max_distance, bidirectional: see `t5_bucket`; a decoder is not bidirectional.
    """

    def __init__(
        self,
        heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__(num_buckets, heads)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def position_bias(
        self, num_queries: int, num_keys: int, first_query: int | None = None
    ) -> PositionBias:
        """The bias of `num_queries` tokens towards `num_keys`.

        Args:
            num_queries: N.
            num_keys: M, at 0, 1 ...
            first_query: place of the first query; None puts the last one beside the last key.
        """
        first_query = num_keys - num_queries if first_query is None else first_query
        bucket = t5_bucket(
            distances(num_queries, num_keys, first_query, self.weight.device),
            num_buckets=self.num_embeddings,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        table = self(bucket).T.contiguous()
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return line_bias(table, num_queries, num_keys, first_query)
