"""Codebooks one after another: a drop-in for `vector_quantize_pytorch.ResidualVQ`."""

import math
import random
from typing import Any

import torch
from torch import Tensor

from musiclm_engine.quantize.codebook_stack import CodebookStack
from musiclm_engine.quantize.options import (
    OF_A_CALL,
    OF_A_RESIDUAL_QUANTIZER,
    QuantizerOptions,
    refuse,
)
from musiclm_engine.quantize.processes import of_process_0
from musiclm_engine.quantize.quantizer import Quantizer
from musiclm_kernels import rvq_decode


class ResidualVQ(Quantizer):
    """Q codebooks, each quantising what the ones before it left over (SoundStream, arXiv 2107.03312,
    section III-C, algorithm 1).

    Args:
        dim: width of the vectors.
        codebook_size: K, or Q times the same in a tuple.
        num_quantizers: Q.
        codebook_dim: D of the codes, where it is not dim: linear maps lead there and back.
        quantize_dropout: in training, use a random number of the levels, so that one model serves
            every bit rate.
        quantize_dropout_cutoff_index: so many levels, and one more, are always used.
        quantize_dropout_multiple_of: the number of levels is rounded up to such a multiple.
        quantize_dropout_share: the share of a batch's items that drop levels, each a number of its
            own; None: all items drop the same. Not an option of vector-quantize-pytorch.
        options: see `QuantizerOptions`.

    Raises:
        ValueError: a size out of range, codebooks of several sizes, or an option of
            vector-quantize-pytorch that is not had here with another value than its default.
    """

    layers: CodebookStack

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        num_quantizers: int | None = None,
        codebook_dim: int | None = None,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quantize_dropout_share: float | None = None,
        **options: Any,
    ) -> None:
        had = QuantizerOptions.of(options, OF_A_RESIDUAL_QUANTIZER)
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,)
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("num_quantizers is None, wanted a number, or a tuple as codebook_size")
        Q = len(sizes) if num_quantizers is None else num_quantizers
        if len(set(sizes)) != 1 or (isinstance(codebook_size, tuple) and len(sizes) != Q):
            raise ValueError(f"codebook_size is {codebook_size}, wanted {Q} times the same size")
        super().__init__(dim, sizes[0], Q, codebook_dim, had)
        self.num_quantizers = Q
        if not 0 <= quantize_dropout_cutoff_index < Q:
            raise ValueError(
                f"quantize_dropout_cutoff_index is {quantize_dropout_cutoff_index}, "
                f"wanted 0 to {Q - 1}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(
                f"quantize_dropout_multiple_of is {quantize_dropout_multiple_of}, wanted 1 or more"
            )
        self.quantize_dropout = quantize_dropout and Q > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quantize_dropout_share = quantize_dropout_share
        self.layers = CodebookStack(Q, sizes[0], self.codebook_dim, had, key="{}._codebook.")

    @property
    def stack(self) -> CodebookStack:
        return self.layers

    @property
    def codebooks(self) -> Tensor:
        """[Q, K, D]."""
        return self.stack.embed

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        *,
        freeze_codebook: bool | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        levels_kept: Tensor | None = None,
        **unsupported: Any,
    ) -> tuple[Tensor, ...]:
        """Quantise x, and in training move the codebooks.

        Args:
            x: [B, ..., dim], [B, dim, ...] or [B, dim], as the options say.
            mask: [B, ...] bool, True for the vectors that count.
            indices: [B, ..., Q] int64, or a list of Q [B, ...]: codes that x should have.
            return_all_codes: whether to return each level's codes too.
            freeze_codebook: in the place of the constructor's.
            rand_quantize_dropout_fixed_seed: how many levels stay, by Python's generator rather
                than the device's.
            levels_kept: [] or [B] int64, how many levels stay. Not an option of
                vector-quantize-pytorch.

        Returns:
            quantized as x, with a gradient in training; indices [B, ..., Q] int64, -1 where a level
            is dropped or the mask leaves one out; weighted commitment losses [Q], each the mean
            of (residual - its code)^2 over the vectors that have a code there, in the codebooks'
            space, zeros in evaluation; if asked for, codes [Q, B, ..., D].
            With indices given: quantized and the sum over levels of their cross-entropy under
            softmax(-distances), each level seeing what x's own codes left over.

        Raises:
            ValueError: x or mask has another shape or dtype.
        """
        refuse(unsupported, OF_A_CALL)
        if isinstance(indices, list):
            indices = torch.stack(indices, dim=-1)
        if levels_kept is None and self.training and self.quantize_dropout and indices is None:
            levels_kept = self.draw_levels_kept(
                x.shape[0], x.device, seed=rand_quantize_dropout_fixed_seed
            )
        quantized, codes, losses = self._quantize(x, mask, indices, freeze_codebook, levels_kept)
        if indices is not None:
            return quantized, losses.sum()
        if return_all_codes:
            return quantized, codes, losses, self.get_codes_from_indices(codes)
        return quantized, codes, losses

    def draw_levels_kept(
        self, num_items: int, device: torch.device, *, seed: int | None = None
    ) -> Tensor:
        """How many levels stay, [], the same in every process, or [num_items] int64: drawn on the
        device, where nobody waits for it."""
        first, Q = self.quantize_dropout_cutoff_index, self.num_quantizers
        if seed is not None:
            drawn = torch.full((), random.Random(seed).randrange(first, Q), device=device)
        else:
            shape = () if self.quantize_dropout_share is None else (num_items,)
            drawn = torch.randint(first, Q, shape, device=device)
        multiple = self.quantize_dropout_multiple_of
        kept = torch.div(drawn + multiple, multiple, rounding_mode="floor") * multiple
        if self.quantize_dropout_share is not None:
            drops = torch.rand(num_items, device=device) < self.quantize_dropout_share
            return torch.where(drops, kept, Q)
        return of_process_0(kept) if self.stack.is_synced else kept

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices [B, ..., q <= Q] -> the code of each level, [Q, B, ..., D]; zeros for -1 and for
        levels that are not given."""
        flat = indices.reshape(-1, indices.shape[-1])
        flat = torch.nn.functional.pad(flat, (0, self.num_quantizers - flat.shape[1]), value=-1)
        levels = torch.arange(self.num_quantizers, device=indices.device)[:, None]
        codes = self.codebooks[levels, flat.t().clamp_min(0)]
        codes = codes.masked_fill((flat.t() < 0)[..., None], 0.0)
        return codes.view(self.num_quantizers, *indices.shape[:-1], -1)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices [B, ..., q <= Q] -> what `forward` gave with them, in x's layout."""
        flat = indices.reshape(math.prod(indices.shape[:-1]), indices.shape[-1])
        total = rvq_decode(flat, self.codebooks).view(*indices.shape[:-1], self.codebook_dim)
        nothing = (indices < 0).all(dim=-1, keepdim=True)  # left out by a mask
        return self._channels_back(self.project_out(total).masked_fill(nothing, 0.0))
