"""Tokens on a line: the distances between them, and their codes."""

import torch
from torch import Tensor

from musiclm_engine.attention.position_bias import PositionBias


def distances(
    num_queries: int, num_keys: int, first_query: int, device: torch.device | None
) -> Tensor:
    """int64 [T], ascending: each distance query - key, queries from `first_query` and keys from 0."""
    return torch.arange(1 - num_keys, first_query + num_queries, device=device)


def line_bias(table: Tensor, num_queries: int, num_keys: int, first_query: int) -> PositionBias:
    """The bias whose table [H, T] has an entry for each of `distances`."""
    queries = torch.arange(num_queries, dtype=torch.int32, device=table.device)
    keys = torch.arange(num_keys, dtype=torch.int32, device=table.device)
    return PositionBias(
        table=table,
        q_codes=(queries + first_query)[None],
        k_codes=keys[None],
        offset=num_keys - 1,
    )
