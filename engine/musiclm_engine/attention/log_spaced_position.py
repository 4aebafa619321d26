"""Swin Transformer V2's position bias: a network of log-spaced offsets within a window."""

import math

import torch
from torch import Tensor, nn

from musiclm_engine.attention.grid import grid_bias
from musiclm_engine.attention.mlp_table import mlp_outputs
from musiclm_engine.attention.position_bias import PositionBias

WIDTH = 512  # of the network's one hidden layer
LARGEST_BIAS = 16.0
LARGEST_OFFSET = 8.0  # what the largest offset of the trained window counts before the logarithm


class LogSpacedPositionBias(nn.Sequential):
    """16 sigmoid(network(offset)), offsets log-spaced and relative to the window's size.

    Drop-in for what timm and torchvision register as `cpb_mlp`: the same keys, 0 and 2, and called
    with [..., 2] offsets it gives what the network alone does, [..., H].
    Source: arXiv 2111.09883, section 3.3, equation 4.

    Args:
        heads: H.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Linear(2, WIDTH, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(WIDTH, heads, bias=False, device=device, dtype=dtype),
        )

    def position_bias(
        self, window_size: tuple[int, int], pretrained_window_size: tuple[int, int] = (0, 0)
    ) -> PositionBias:
        """The bias among all tokens of a window, row of the image by row: [1, height * width] codes.

        Args:
            window_size: height and width in tokens.
            pretrained_window_size: height and width that the weights were trained for, by which
                offsets are measured; (0, 0) means `window_size`.
        """
        trained_for = pretrained_window_size if pretrained_window_size[0] > 0 else window_size
        device = next(self.parameters()).device
        down, right = (
            _log_spaced(size, trained, device)
            for size, trained in zip(window_size, trained_for, strict=True)
        )
        offsets = torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1)
        table = LARGEST_BIAS * mlp_outputs(self, offsets).sigmoid()
        return grid_bias(table.movedim(-1, 0), *window_size)


def _log_spaced(size: int, trained_size: int, device: torch.device) -> Tensor:
    """[2 * size - 1]: the offsets along one side. A side of 1 has the offset 0 alone."""
    offsets = torch.arange(1 - size, size, dtype=torch.float32, device=device)
    offsets = offsets / max(trained_size - 1, 1) * LARGEST_OFFSET
    return offsets.sign() * torch.log2(offsets.abs() + 1.0) / math.log2(LARGEST_OFFSET)
