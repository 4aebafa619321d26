"""Patch dropout in plain PyTorch: which patches of a row stay."""

import torch
from torch import Tensor

from musiclm_kernels.philox import random_words


def drop_patches(x: Tensor, keep: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Keep the patches with the `keep` smallest Philox words of (seed, row * N + patch), in order."""
    B, N, D = x.shape
    patches = torch.arange(N, device=x.device)
    rows = torch.arange(B, device=x.device)[:, None]
    words = random_words(seed, rows * N + patches)
    ranked = words * N + patches  # equal words: the lower patch wins
    indices = ranked.topk(keep, largest=False).indices.sort().values
    return x.gather(1, indices[:, :, None].expand(B, keep, D)), indices
