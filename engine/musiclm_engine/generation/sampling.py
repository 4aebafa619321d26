"""How tokens are drawn: the settings of a stage, and seeds that depend on nothing else."""

import hashlib
import math
import operator
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of one stage, as `musiclm_kernels.sample_logits` takes them.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest; 0 is off.
        top_p: draw from the likeliest that hold this much probability, above 0; 1 is off.
        min_p: drop tokens less likely than this share of the likeliest; 0 is off.
        guidance: classifier-free guidance (arXiv 2207.12598): 1 is off, higher follows the
            prompt more closely; it doubles the work.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("guidance", -math.inf, math.inf),
        ):
            value = getattr(self, name)
            is_number = isinstance(value, Real) and math.isfinite(value)
            if not is_number or not low <= value <= high:
                raise ValueError(f"{name} is {value}, wanted a number from {low} to {high}")
        if self.top_p == 0:
            raise ValueError(f"top_p is {self.top_p}, wanted a number above 0")
        if self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}, wanted a whole number")
        object.__setattr__(self, "top_k", int(self.top_k))


def derive_seeds(seed: int, *path: int | str, count: int) -> Tensor:
    """int64 seeds [count], each a hash of (seed, path, its own number) and of nothing else."""
    seed = operator.index(seed)  # NumPy's 3 and PyTorch's 3 are the same seed as Python's
    return torch.tensor([_hash(seed, *path, row) for row in range(count)], dtype=torch.int64)


def _hash(*parts: int | str) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
