"""One problem of `embed_patches` as its kernels take it."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

MAX_PATCH_SIZE = 128  # one patch must fit the registers of one program
COLUMNS = 128  # of what the kernels read: the folded weight and the positions are padded to blocks


@dataclass(frozen=True)
class Problem:
    """The spectrogram [B, W * P, H * P], its last stride 1; the parameters, packed; and sizes."""

    spectrogram: Tensor
    keep: int
    P: int
    patch_norm_weight: Tensor
    patch_norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    dtype: torch.dtype  # of the tokens and of the product's factors

    @classmethod
    def of(
        cls,
        spectrogram: Tensor,
        keep: int,
        P: int,
        parameters: tuple[Tensor, ...],
        dtype: torch.dtype,
    ) -> "Problem":
        if P > MAX_PATCH_SIZE:
            raise ValueError(f"patch_size is {P}, wanted at most {MAX_PATCH_SIZE} on CUDA")
        if spectrogram.device.type == "cpu" and dtype == torch.bfloat16:
            raise RuntimeError("through_kernels: Triton's interpreter cannot multiply bfloat16")
        if spectrogram.stride(-1) != 1:
            spectrogram = spectrogram.contiguous()
        weights, biases = (tuple(p.contiguous() for p in parameters[i::2]) for i in (0, 1))
        return cls(
            spectrogram, keep, P, weights[0], biases[0], weights[1], biases[1],
            weights[2], biases[2], dtype,
        )  # fmt: skip

    @property
    def B(self) -> int:
        return self.spectrogram.shape[0]

    @property
    def W(self) -> int:
        return self.spectrogram.shape[1] // self.P

    @property
    def H(self) -> int:
        return self.spectrogram.shape[2] // self.P

    @property
    def M(self) -> int:
        """Tokens."""
        return self.B * self.keep

    @property
    def D(self) -> int:
        return self.weight.shape[0]

    @property
    def padded_D(self) -> int:
        return triton.cdiv(self.D, COLUMNS) * COLUMNS

    @property
    def P2(self) -> int:
        """The side of a patch as the kernels lay it out."""
        return max(triton.next_power_of_2(self.P), 4)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.spectrogram.device)
