"""Dynamic position bias over one dimension."""

from itertools import pairwise

from torch import Tensor, nn

from musiclm_engine.attention.line import distances, line_bias
from musiclm_engine.attention.mlp_table import mlp_outputs
from musiclm_engine.attention.position_bias import PositionBias


class RelativePositionBias(nn.Module):
    """A network from the distance of two tokens to one bias a head.

    Drop-in for `RelativePositionBias` of audiolm-pytorch 2.4.0 (audiolm_pytorch.py), which takes it
    from Swin Transformer V2 (arXiv 2111.09883, section 3.3), with plain distances.

    Args:
        dim: width of the network.
        heads: H.
        layers: hidden layers, at least 1.

    Raises:
        ValueError: layers below 1.
    """

    def __init__(self, *, dim: int, heads: int, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers={layers}; want at least 1")
        hidden = [
            nn.Sequential(nn.Linear(width, wider), nn.SiLU())
            for width, wider in pairwise([1, *[dim] * layers])
        ]
        self.net = nn.Sequential(*hidden, nn.Linear(dim, heads))

    def position_bias(self, num_queries: int, num_keys: int) -> PositionBias:
        """The bias of the last `num_queries` of `num_keys` tokens towards all of them.

        Raises:
            ValueError: more queries than keys.
        """
        if num_queries > num_keys:
            raise ValueError(f"{num_queries} queries of {num_keys} keys; want at most as many")
        first_query = num_keys - num_queries
        device = next(self.parameters()).device
        x = distances(num_queries, num_keys, first_query, device)
        table = mlp_outputs(self.net, x[:, None]).T.contiguous()
        return line_bias(table, num_queries, num_keys, first_query)

    def forward(self, i: int, j: int) -> Tensor:
        """[H, i, j] in the weights' dtype: `position_bias(i, j)` for each pair, as upstream."""
        return self.position_bias(i, j).dense()[0].to(next(self.parameters()).dtype)
