"""ALiBi: attention with linear biases, which has nothing to learn."""

import torch
from torch import Tensor, nn

from musiclm_engine.attention.line import distances, line_bias
from musiclm_engine.attention.position_bias import PositionBias


def alibi_slopes(heads: int) -> Tensor:
    """float32 [heads]: 2^(-8/n), 2^(-16/n) ... for n = heads, a power of two.

    For other counts n is the power below, and every second slope of twice that power follows: what
    the authors' code does (arXiv 2108.12409, section 3, and its published `get_slopes`).

    Raises:
        ValueError: heads below 1.
    """
    if heads < 1:
        raise ValueError(f"heads={heads}; want at least 1")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * head / power) for head in range(1, power + 1)]
    slopes += [2.0 ** (-4 * head / power) for head in range(1, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


class AlibiBias(nn.Module):
    """-slope * distance, a slope for each head (arXiv 2108.12409, section 3). No parameters.

    Args:
        heads: H.
        symmetric: the distance to keys after the query counts too, as for attention that sees
            them; else their bias is positive, which is of use to causal attention alone.
    """

    slopes: Tensor

    def __init__(self, heads: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.register_buffer("slopes", alibi_slopes(heads), persistent=False)

    def position_bias(self, num_queries: int, num_keys: int) -> PositionBias:
        """The bias of tokens whose last query stands beside the last key."""
        first_query = num_keys - num_queries
        distance = distances(num_queries, num_keys, first_query, self.slopes.device)
        if self.symmetric:
            distance = distance.abs()
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
        return line_bias(-slopes[:, None] * distance, num_queries, num_keys, first_query)

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """[H, N, M]: the bias of each pair."""
        return self.position_bias(num_queries, num_keys).dense()[0]
