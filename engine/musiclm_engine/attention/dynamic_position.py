"""Dynamic position bias over a grid."""

import torch
from einops.layers.torch import Rearrange
from torch import nn

from musiclm_engine.attention.grid import grid_bias
from musiclm_engine.attention.mlp_table import mlp_outputs
from musiclm_engine.attention.position_bias import PositionBias

OFFSET_SCALE = 1 / 16  # of the first weights at the start: offsets reach 60, activations do not


class DynamicPositionBias2d(nn.Sequential):
    """A network from the offset of two tokens, in rows and columns, to one bias a head.

    Drop-in for what musiclm-pytorch 0.2.8 (musiclm_pytorch.py) registers as `dynamic_pos_bias_mlp`:
    the same keys, 0, 2 and 4, and called with [..., i, j, 2] offsets it gives [..., H, i, j].
    The idea is Swin Transformer V2's (arXiv 2111.09883, section 3.3), with plain offsets.

    Args:
        dim: width of the network.
        heads: H.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(
            nn.Linear(2, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
            nn.Linear(dim, heads),
            Rearrange("... i j h -> ... h i j"),
        )
        with torch.no_grad():
            next(self.parameters()).mul_(OFFSET_SCALE)

    def position_bias(self, num_columns: int, num_rows: int) -> PositionBias:
        """The bias among all tokens of a grid, column by column: [1, W * H] codes."""
        device = next(self.parameters()).device
        columns = torch.arange(1 - num_columns, num_columns, device=device)
        rows = torch.arange(1 - num_rows, num_rows, device=device)
        across, along = torch.meshgrid(columns, rows, indexing="ij")
        table = mlp_outputs(self, torch.stack((along, across), dim=-1))
        return grid_bias(table, num_columns, num_rows)
