"""The position biases of audiolm-pytorch's three transformers, as a table and codes.

All of them are causal, so a query is never before its key, and hold for sequences of

    [start, context tokens, start, target tokens]         (of a semantic stage the second half alone)

Each is exact: two tokens' difference of codes, plus the offset, is an index of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from musiclm_engine.attention import DynamicPositionBias2d, RelativePositionBias
from musiclm_engine.attention.mlp_table import mlp_outputs
from musiclm_engine.interop.entries import Entries


@dataclass(frozen=True)
class LineBias:
    """By the distance of two tokens; another one, if `apart`, between context and target.

    Attributes:
        table: [H, T] float32. Index t is the distance t; the last is between context and target.
        apart: whether there is such an entry.
    """

    table: Tensor
    apart: bool
    offset: int = 0

    def codes(self, context_length: int, length: int) -> tuple[Tensor, Tensor]:
        """int32 [N] each, of queries and keys; ValueError for a length past the table's end."""
        most = self.table.shape[1] - self.apart
        if length > most:
            raise ValueError(f"length is {length}, wanted at most {most}, the stage's own")
        places = torch.arange(length, dtype=torch.int32, device=self.table.device)
        if self.apart:  # so far from the context that the index is past the table's end
            places = places + self.table.shape[1] * (places > context_length)
        return places.int(), places.int()


@dataclass(frozen=True)
class GridBias:
    """By the distance in frames and in levels; another one with a start token.

    Attributes:
        table: [H, T] float32; the last entry is that of the start tokens.
        context_levels, levels: of a frame, in the context and altogether.
        frames: of the longer of context and target.
    """

    table: Tensor
    context_levels: int
    levels: int
    frames: int

    @property
    def offset(self) -> int:
        return (self.frames - 1) * (2 * self.levels - 1) + self.levels - 1

    def codes(self, context_length: int, length: int) -> tuple[Tensor, Tensor]:
        """int32 [N] each, of queries and keys; ValueError for other frames than the table's."""
        wanted, most = self.frames * self.context_levels, 2 + self.frames * self.levels
        if context_length != wanted:
            raise ValueError(
                f"context_length is {context_length}, wanted {wanted}: the stage is made for "
                f"{self.frames} frames of {self.context_levels} tokens"
            )
        if length > most:
            raise ValueError(f"length is {length}, wanted at most {most}: {self.frames} frames")
        index = torch.arange(length, device=self.table.device)
        target = index - context_length - 2  # number of the token within the target
        target_levels = self.levels - self.context_levels
        in_target = target >= 0
        own = torch.where(in_target, target, index - 1)
        levels = torch.where(in_target, target_levels, self.context_levels)
        frame, level = own // levels, own % levels + in_target * self.context_levels
        codes = frame * (2 * self.levels - 1) + level
        start = (index == 0) | (index == context_length + 1)
        beyond = 2 * self.table.shape[1]  # leaves the table at its end, whatever the other code is
        q_codes = torch.where(start, beyond, codes).int()
        return q_codes, torch.where(start, -beyond, codes).int()


def read_line_bias(entries: Entries, length: int, apart: Tensor | None) -> LineBias | None:
    """Of the entries `transformer.rel_pos_bias`; None if there are none.

    Args:
        length: the longest sequence.
        apart: [H, 1, 1], the bias between context and target.
    """
    if not entries.names():
        return None
    num_hidden = max(int(name.split(".")[1]) for name in entries.names())
    width, heads = len(entries.peek("net.0.0.bias")), len(entries.peek(f"net.{num_hidden}.bias"))
    network = RelativePositionBias(dim=width, heads=heads, layers=num_hidden)
    _load(network, entries)
    distances = torch.arange(length, device=next(network.parameters()).device)
    table = mlp_outputs(network.net, distances[:, None]).T
    if apart is not None:
        table = torch.cat((table, apart.float().view(heads, 1)), 1)
    return LineBias(table.detach().contiguous(), apart is not None)


def read_grid_bias(
    entries: Entries, frames: int, context_levels: int, levels: int, start: Tensor | None
) -> GridBias | None:
    """Of the entries `pos_bias_mlp`; None if there are none.

    Args:
        start: [H, 1, 1], the bias of start tokens.
    """
    if not entries.names() or start is None:
        return None
    width, heads = len(entries.peek("0.bias")), len(entries.peek("4.bias"))
    network = DynamicPositionBias2d(width, heads)
    _load(network, entries)
    # Its inputs are not the distances but these and what makes them positive: `frames` counts.
    device = next(network.parameters()).device
    shifted = [torch.arange(2 * count - 1, device=device) for count in (frames, levels)]
    grid = torch.stack(torch.meshgrid(*shifted, indexing="ij"), dim=-1)
    table = torch.cat((mlp_outputs(network, grid).flatten(1), start.float().view(heads, 1)), 1)
    return GridBias(table.detach().contiguous(), context_levels, levels, frames)


def _load(network: torch.nn.Module, entries: Entries) -> None:
    weights = {name: entries.take(name).float() for name in entries.names()}
    network.load_state_dict(weights, assign=True)
