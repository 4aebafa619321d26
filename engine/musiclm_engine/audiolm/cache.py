"""The static key-value cache of a decoder."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, allocated once at full size.

    Attributes:
        keys, values: [layers, B, H, S, D].
        codes: [1, S] int32, the position code of each slot.
        lengths: [B] int32, filled slots; every row is filled alike.
        length: the same number, on the host.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        slots: int,
        dim_head: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch, heads, slots, dim_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.codes = torch.zeros(1, slots, device=device, dtype=torch.int32)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self.length = 0

    def extend(self, codes: Tensor) -> slice:
        """Claim the slots of the next tokens, whose position codes are given: [n]."""
        start, end = self.length, self.length + len(codes)
        if end > self.codes.shape[1]:
            raise ValueError(
                f"the cache holds {self.codes.shape[1]} tokens, {end} were asked of it"
            )
        self.codes[0, start:end] = codes
        self.lengths.fill_(end)
        self.length = end
        return slice(start, end)
