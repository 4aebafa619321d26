"""Where a patch lies on the (time, frequency) grid: absolute, and relative as an attention bias.

A patch at frame column x (of W) and frequency row y (of H) has the code `x * (2H - 1) + y`, so the
difference of two codes plus `grid_offset` numbers each of the (2W - 1)(2H - 1) offsets between
two patches once. The bias is an MLP of that offset: a small table, never N^2 pairs.
"""

import torch
from torch import Tensor, nn

OFFSET_SCALE = 1 / 16  # of the MLP's first weights: offsets reach 60 patches, activations do not


def sincos_positions(
    num_columns: int, num_rows: int, dim: int, device: torch.device | None = None
) -> Tensor:
    """Fixed 2-D sine-cosine positions [W * H, dim], time-major, of vision transformers without
    learned positions (Beyer et al., arXiv 2205.01580)."""
    frequencies = 10000 ** -torch.linspace(0, 1, dim // 4, device=device)
    columns = torch.arange(num_columns, device=device).repeat_interleave(num_rows)
    rows = torch.arange(num_rows, device=device).repeat(num_columns)
    x = columns[:, None] * frequencies
    y = rows[:, None] * frequencies
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)


def patch_codes(num_columns: int, num_rows: int, device: torch.device | None = None) -> Tensor:
    """int32 codes [W * H] of the patches, time-major."""
    columns = torch.arange(num_columns, dtype=torch.int32, device=device)[:, None]
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    return (columns * (2 * num_rows - 1) + rows).flatten()


def grid_offset(num_columns: int, num_rows: int) -> int:
    """What makes the smallest difference of two codes zero."""
    return (num_columns - 1) * (2 * num_rows - 1) + num_rows - 1


def position_bias_mlp(dim: int, heads: int) -> nn.Sequential:
    """MLP from a (rows, columns) offset in patches to one bias a head."""
    first = nn.Linear(2, dim)
    with torch.no_grad():
        first.weight *= OFFSET_SCALE
    return nn.Sequential(first, nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, heads))


def position_bias_table(mlp: nn.Module, num_columns: int, num_rows: int) -> Tensor:
    """float32 bias table [heads, (2W - 1)(2H - 1)] over all offsets of the grid.

    Dynamic position bias: Swin Transformer V2 (arXiv 2111.09883, section 3.3) with linear offsets.
    """
    device = next(mlp.parameters()).device
    columns = torch.arange(1 - num_columns, num_columns, device=device)
    rows = torch.arange(1 - num_rows, num_rows, device=device)
    across, along = torch.meshgrid(columns, rows, indexing="ij")
    offsets = torch.stack((along, across), dim=-1).flatten(0, 1)  # [T, 2]: rows, columns
    with torch.autocast(device.type, enabled=False):
        table = mlp(offsets.to(next(mlp.parameters()).dtype))
    return table.float().T.contiguous()
