"""Residual quantisers side by side: a drop-in for `vector_quantize_pytorch.GroupedResidualVQ`."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from musiclm_engine.quantize.codebook_stack import Batches
from musiclm_engine.quantize.residual_vq import ResidualVQ


class GroupedResidualVQ(nn.Module):
    """G residual quantisers, each of its share of the vectors' dimensions (HiFi-Codec,
    arXiv 2305.02765).

    Args:
        dim: width of the vectors, a multiple of groups.
        groups: G.
        options: of each group's `ResidualVQ`.

    Raises:
        ValueError: dim is no multiple of groups, or as `ResidualVQ`.
    """

    def __init__(self, *, dim: int, groups: int = 1, **options: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"dim is {dim}, wanted a multiple of groups, {groups}")
        self.dim = dim
        self.groups = groups
        self.rvqs = nn.ModuleList(ResidualVQ(dim=dim // groups, **options) for _ in range(groups))

    @property
    def quantizers(self) -> tuple[ResidualVQ, ...]:
        """`rvqs`, whose type a ModuleList forgets."""
        return cast(tuple[ResidualVQ, ...], tuple(self.rvqs))

    @property
    def codebooks(self) -> Tensor:
        """[G, Q, K, D]."""
        return torch.stack([rvq.codebooks for rvq in self.quantizers])

    @property
    def split_dim(self) -> int:
        """The dimension of x that is shared among the groups."""
        return 1 if self.quantizers[0].has_channels_second else -1

    def fit(self, batches: Batches, *, seed: int, iterations: int = 20) -> None:
        """As `ResidualVQ.fit`, each group to its own dimensions."""
        for group, rvq in enumerate(self.quantizers):

            def share(batch: Tensor, group: int = group) -> Tensor:
                return batch.chunk(self.groups, self.split_dim)[group]

            data = share(batches) if isinstance(batches, Tensor) else lambda: map(share, batches())
            rvq.fit(data, seed=seed, iterations=iterations)

    def forward(
        self,
        x: Tensor,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        *,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        **unsupported: Any,
    ) -> tuple[Any, ...]:
        """As `ResidualVQ.forward`: all groups drop the same levels.

        Returns:
            quantized as x; indices [G, B, ..., Q]; losses [G, Q]; if asked for, a tuple of each
            group's codes [Q, B, ..., D]. With indices [G, B, ..., Q] given: quantized and the sum
            of all cross-entropies.
        """
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(f"x is {tuple(x.shape)}, wanted {self.dim} in place {self.split_dim}")
        first, levels_kept = self.quantizers[0], None
        if self.training and first.quantize_dropout and indices is None:
            levels_kept = first.draw_levels_kept(
                x.shape[0], x.device, seed=rand_quantize_dropout_fixed_seed
            )
        outputs = [
            rvq(
                part,
                mask=mask,
                indices=None if indices is None else indices[group],
                return_all_codes=return_all_codes,
                freeze_codebook=freeze_codebook,
                levels_kept=levels_kept,
                **unsupported,
            )
            for group, (rvq, part) in enumerate(
                zip(self.quantizers, x.chunk(self.groups, self.split_dim), strict=True)
            )
        ]
        quantized, *others = zip(*outputs, strict=True)
        joined = torch.cat(quantized, self.split_dim)
        if indices is not None:
            return joined, torch.stack(others[0]).sum()
        return joined, torch.stack(others[0]), torch.stack(others[1]), *others[2:]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices [G, B, ..., q <= Q] -> codes [G, Q, B, ..., D]."""
        parts = zip(self.quantizers, indices, strict=True)
        return torch.stack([rvq.get_codes_from_indices(part) for rvq, part in parts])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices [G, B, ..., q <= Q] -> what `forward` gave with them, in x's layout."""
        parts = zip(self.quantizers, indices, strict=True)
        return torch.cat([rvq.get_output_from_indices(p) for rvq, p in parts], self.split_dim)
