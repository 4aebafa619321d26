"""The static key-value cache of a decoder: a few buffers whose shapes never change."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from musiclm_kernels import append_to_cache


class CachedLayer(NamedTuple):
    """keys, values [B, Hkv, S, d]; scales [B, Hkv, S] float32 beside float8, else None."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer.

    Token number p of a row lies at slot p % S: once there are more tokens than slots the cache is
    a ring, which holds the S newest.

    Attributes:
        layers: a buffer of its own for each layer's keys and for its values. Views of one buffer
            would be one input to a compiler, which copies it whole to write a slot.
        positions: [B] int32, the number of the token that is written next; negative writes none.
        lengths: [B] int32, slots that are filled once that token is written.
    """

    layers: tuple[CachedLayer, ...]
    positions: Tensor
    lengths: Tensor

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        batch: int,
        heads: int,
        slots: int,
        dim_head: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """A cache without tokens; heads: Hkv."""
        shape = (batch, heads, slots, dim_head)

        def scales() -> Tensor | None:
            if dtype != torch.float8_e4m3fn:
                return None
            return torch.ones(shape[:-1], device=device, dtype=torch.float32)

        def buffer() -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        return cls(
            tuple(CachedLayer(buffer(), buffer(), scales(), scales()) for _ in range(layers)),
            positions=torch.zeros(batch, device=device, dtype=torch.int32),
            lengths=torch.ones(batch, device=device, dtype=torch.int32),
        )

    @property
    def slots(self) -> int:
        return self.layers[0].keys.shape[2]

    def first_slots(self, slots: int) -> Self:
        """The same cache, as far as its first slots go: views."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, :, :slots]

        layers = tuple(CachedLayer(*map(cut, layer)) for layer in self.layers)  # type: ignore[arg-type]
        return replace(self, layers=layers)

    def append(self, number: int, k: Tensor, v: Tensor) -> None:
        """Write k, v [B, Hkv, N, d] of layer `number` at `positions` and after."""
        layer = self.layers[number]
        if layer.key_scales is None:
            k, v = k.to(layer.keys.dtype), v.to(layer.values.dtype)
        append_to_cache(
            layer.keys, layer.values, k, v, self.positions,
            k_scales=layer.key_scales, v_scales=layer.value_scales,
        )  # fmt: skip
