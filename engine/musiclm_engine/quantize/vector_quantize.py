"""One codebook: a drop-in for `vector_quantize_pytorch.VectorQuantize`."""

from typing import Any

import torch
from torch import Tensor

from musiclm_engine.quantize.codebook_stack import CodebookStack
from musiclm_engine.quantize.options import OF_A_CALL, OF_A_QUANTIZER, QuantizerOptions, refuse
from musiclm_engine.quantize.quantizer import Quantizer


class VectorQuantize(Quantizer):
    """The nearest code of one codebook for each vector (VQ-VAE, arXiv 1711.00937).

    Args:
        dim: width of the vectors.
        codebook_size: K.
        codebook_dim: D of the codes, where it is not dim: linear maps lead there and back.
        options: see `QuantizerOptions`.

    Raises:
        ValueError: a size below 1, or an option of vector-quantize-pytorch that is not had here
            with another value than its default.
    """

    _codebook: CodebookStack

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int | None = None, **options: Any
    ) -> None:
        had = QuantizerOptions.of(options, OF_A_QUANTIZER)
        super().__init__(dim, codebook_size, 1, codebook_dim, had)
        self._codebook = CodebookStack(1, codebook_size, self.codebook_dim, had, key="")

    @property
    def stack(self) -> CodebookStack:
        return self._codebook

    @property
    def codebook(self) -> Tensor:
        """[K, D]."""
        return self.stack.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self.stack.embed.copy_(codes[None])

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        freeze_codebook: bool | None = None,
        **unsupported: Any,
    ) -> tuple[Tensor, ...]:
        """Quantise x, and in training move the codebook.

        Args:
            x: [B, ..., dim], [B, dim, ...] or [B, dim], as the options say.
            indices: [B, ...] int64: codes that x should have; -1 counts nowhere.
            mask: [B, ...] bool, True for the vectors that count.
            lens: [B], how many vectors of each row of [B, T, dim] count, in mask's place.
            freeze_codebook: in the place of the constructor's.

        Returns:
            quantized as x, with a gradient in training; indices [B, ...] int64, -1 where the mask
            leaves one out; the weighted commitment loss, a scalar: the mean of
            (x - its code)^2 over the vectors that count, in the codebook's space; 0 in evaluation.
            With indices given: quantized and their cross-entropy under softmax(-distances).

        Raises:
            ValueError: x or mask has another shape or dtype, or both mask and lens are given.
        """
        refuse(unsupported, OF_A_CALL)
        if lens is not None:
            if mask is not None:
                raise ValueError("mask and lens are both given, wanted one of them")
            length = self._channels_last(x).shape[1]
            mask = torch.arange(length, device=x.device) < lens[:, None]
        wanted = None if indices is None else indices[..., None]
        quantized, codes, losses = self._quantize(x, mask, wanted, freeze_codebook)
        if indices is not None:
            return quantized, losses[0]
        return quantized, codes[..., 0], losses[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices [B, ...] -> their codes [B, ..., D], or [B, D, ...] if x lies so; zeros for -1."""
        codes = self.codebook[indices.clamp_min(0)].masked_fill((indices < 0)[..., None], 0.0)
        return self._channels_back(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Indices [B, ...] -> what `forward` gave with them, in x's layout."""
        nothing = (indices < 0)[..., None]  # left out by a mask
        out = self.project_out(self.codebook[indices.clamp_min(0)])
        return self._channels_back(out.masked_fill(nothing, 0.0))
