"""Tokens on a grid: a code for each, such that the difference of two codes names their offset.

The token at column x (of W) and row y (of H) has the code `x * (2H - 1) + y`, so the difference of
two codes plus `grid_offset` numbers each of the (2W - 1)(2H - 1) offsets between two tokens once.
"""

import torch
from torch import Tensor

from musiclm_engine.attention.position_bias import PositionBias


def grid_codes(num_columns: int, num_rows: int, device: torch.device | None = None) -> Tensor:
    """int32 codes [W * H], column by column."""
    columns = torch.arange(num_columns, dtype=torch.int32, device=device)[:, None]
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    return (columns * (2 * num_rows - 1) + rows).flatten()


def grid_offset(num_columns: int, num_rows: int) -> int:
    """What makes the smallest difference of two codes zero."""
    return (num_columns - 1) * (2 * num_rows - 1) + num_rows - 1


def grid_bias(table: Tensor, num_columns: int, num_rows: int) -> PositionBias:
    """The bias whose table [heads, 2W - 1, 2H - 1] has an entry for each offset, from (1 - W, 1 - H)
    on, among all tokens of the grid."""
    codes = grid_codes(num_columns, num_rows, table.device)[None]
    return PositionBias(
        table=table.flatten(1),
        q_codes=codes,
        k_codes=codes,
        offset=grid_offset(num_columns, num_rows),
        grid_rows=num_rows,
    )
