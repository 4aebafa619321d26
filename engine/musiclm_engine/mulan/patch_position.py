"""Where a patch lies on the (time, frequency) grid."""

import torch
from torch import Tensor


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
