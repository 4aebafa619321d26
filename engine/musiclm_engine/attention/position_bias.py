"""A positional bias as attention reads it: a small table, and a code for the place of each token.

    bias[h, i, j] = table[h, clamp(q_codes[i] - k_codes[j] + offset, 0, T - 1)]

A bias that somebody else gives for every pair has this form too, with a table as large as itself.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CODE = 1 << 30  # of `biased_attention`, and the code that leaves every table at its end


@dataclass(frozen=True, eq=False)
class PositionBias:
    """The bias of one forward pass, in the terms of `musiclm_kernels.biased_attention`.

    Every layer reads the same table, so its gradients are added up before they go, once, through
    whatever made it.

    Args:
        table: [H, T] float32; float64 if a float64 module made it.
        q_codes: [B, N] or [1, N] int32.
        k_codes: [B, M] or [1, M] int32.
        offset: added to the difference of two codes.
        grid_rows: rows of the grid that the codes lie on, code = column * (2 * rows - 1) + row; 1
            for places on a line. How fast the table's gradient is depends on it, and nothing else.
    """

    table: Tensor
    q_codes: Tensor
    k_codes: Tensor
    offset: int
    grid_rows: int = 1

    def arguments(self) -> dict[str, Any]:
        """What to hand to `biased_attention(q, k, v, **bias.arguments())`."""
        return {
            "table": self.table,
            "q_codes": self.q_codes,
            "k_codes": self.k_codes,
            "offset": self.offset,
            "grid_rows": self.grid_rows,
        }

    def dense(self) -> Tensor:
        """[B or 1, H, N, M]: the bias of every pair, for code that adds it to its own scores."""
        difference = self.q_codes[:, :, None].long() - self.k_codes[:, None, :].long()
        index = (difference + self.offset).clamp(0, self.table.shape[1] - 1)
        return self.table[:, index].transpose(0, 1)

    def kept(self, indices: Tensor) -> "PositionBias":
        """The bias among the tokens that patch dropout keeps: [B, keep] int64, of N = M tokens."""
        codes = self.q_codes.expand(len(indices), -1).gather(1, indices)
        return replace(self, q_codes=codes, k_codes=codes)

    def repeated(self, times: int) -> "PositionBias":
        """The bias of `times` batches one after the other, each with the codes of this one."""
        return replace(
            self,
            q_codes=_repeated_rows(self.q_codes, times),
            k_codes=_repeated_rows(self.k_codes, times),
        )

    def with_unbiased_keys(self, num_keys: int) -> "PositionBias":
        """The same with `num_keys` keys before the others, towards which the bias is zero.

        The table grows by the zero: indices past its end, if there were any, now find that.
        """
        return replace(
            self,
            table=F.pad(self.table, (0, 1)),
            k_codes=F.pad(self.k_codes, (num_keys, 0), value=-MAX_CODE),
        )

    def within_regions(
        self, regions: Tensor, num_regions: int, between: float = -100.0
    ) -> "PositionBias":
        """The same with `between` added for each pair of tokens from two different regions.

        The table is repeated for each difference of two region numbers, so this is exact.

        Args:
            regions: [B, N] integers in [0, num_regions), of N = M tokens.
            num_regions: R; the table becomes 2R - 1 times as long.
            between: added to a score; -100 is what Swin Transformer's shifted windows add.
        """
        length = self.table.shape[1]
        differences = torch.arange(1 - num_regions, num_regions, device=self.table.device)
        added = between * (differences != 0).to(self.table.dtype)
        codes = (self.q_codes + regions * length).to(torch.int32)
        return replace(
            self,
            table=(self.table[:, None, :] + added[:, None]).flatten(1),
            q_codes=codes,
            k_codes=codes,
            offset=self.offset + (num_regions - 1) * length,
        )


def dense_position_bias(bias: Tensor, like: tuple[int, int, int, int], name: str) -> PositionBias:
    """A bias given for every pair, as a table with an entry for each: exact, and as large as it is.

    Args:
        bias: broadcasts to `like`; any float dtype.
        like: shape of the scores, (B, H, N, M).
        name: the caller's name of the bias, for its errors.

    Raises:
        ValueError: the bias does not broadcast to the scores, or has more than 2^30 pairs a head.
    """
    bias = in_four_dimensions(bias, like, name)
    B, (_, H, N, M) = len(bias), like
    if B * N * M > MAX_CODE:
        raise ValueError(f"{name} has {B * N * M} pairs a head; want at most {MAX_CODE}")
    table = bias.expand(B, H, N, M).transpose(0, 1).flatten(1)
    rows = torch.arange(B, dtype=torch.int32, device=bias.device)[:, None]
    queries = torch.arange(N, dtype=torch.int32, device=bias.device)
    keys = torch.arange(M, dtype=torch.int32, device=bias.device)
    return PositionBias(
        table=table.to(torch.promote_types(bias.dtype, torch.float32)),
        q_codes=(rows * N + queries) * M,
        k_codes=-keys[None],
        offset=0,
    )


def in_four_dimensions(bias: Tensor, like: tuple[int, int, int, int], name: str) -> Tensor:
    """The bias with leading dimensions of 1; ValueError if it does not broadcast to `like`."""
    shape = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    if len(shape) > 4 or any(size not in (1, full) for size, full in zip(shape, like, strict=True)):
        raise ValueError(f"{name} has shape {tuple(bias.shape)}; want what broadcasts to {like}")
    return bias.view(shape)


def bias_arguments(
    bias: PositionBias | Tensor | None,
    like: tuple[int, int, int, int],
    name: str,
    *,
    num_unbiased_keys: int = 0,
) -> dict[str, Any]:
    """What `biased_attention` takes for a bias in either form; nothing for None.

    Args:
        bias: a tensor broadcasts to `like`.
        like: shape of the scores that have a bias, (B, H, N, M).
        name: the caller's name of the bias, for its errors.
        num_unbiased_keys: keys before those M, see `PositionBias.with_unbiased_keys`.

    Raises:
        ValueError: see `dense_position_bias`.
    """
    if bias is None:
        return {}
    if isinstance(bias, Tensor):
        bias = dense_position_bias(bias, like, name)
    if num_unbiased_keys:
        bias = bias.with_unbiased_keys(num_unbiased_keys)
    return bias.arguments()


def _repeated_rows(codes: Tensor, times: int) -> Tensor:
    return codes if codes.shape[0] == 1 else codes.repeat(times, 1)
