"""Patch dropout, and the way from a spectrogram to the tokens of the patches that stay, in plain
PyTorch.

Dimensions: B batch, N patches, K of them kept, P side of a patch, W by H the grid of patches, time
by frequency: patch n stands at column n // H and row n % H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.philox import random_words

EPSILON = 1e-5  # of both layer norms, nn.LayerNorm's
BASE = 10000.0  # the longest wavelength of the positions is this times the shortest


def drop_patches(x: Tensor, keep: int, *, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """Keep the patches with the `keep` smallest Philox words of (seed, row, patch), in order."""
    B, N, D = x.shape
    indices, _, _ = choose_patches(seed_tensor(seed, x.device), None, B, N, keep, x.device)
    return x.gather(1, indices[:, :, None].expand(B, keep, D)), indices


def embed_patches(
    spectrogram: Tensor,
    *,
    patch_size: int,
    patch_norm_weight: Tensor,
    patch_norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    keep: int | None = None,
    seed: int | Tensor | None = None,
    num_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer norm, projection, layer norm and position of the patches that stay. In at least fp32,
    rounded once, to the projection's dtype."""
    N = (spectrogram.shape[1] // patch_size) * (spectrogram.shape[2] // patch_size)
    drawn = None if seed is None else seed_tensor(seed, spectrogram.device)
    parameters = (patch_norm_weight, patch_norm_bias, weight, bias, norm_weight, norm_bias)
    tokens, indices, codes, key_mask, _ = tokens_and_places(
        spectrogram, num_valid, drawn, keep or N, patch_size, *parameters, weight.dtype
    )
    return tokens, indices, codes, key_mask


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """int64 []."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def choose_patches(
    seed: Tensor | None,
    num_valid: Tensor | None,
    B: int,
    N: int,
    keep: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which patches of each row stay.

    Args:
        seed: int64 []; None where all N stay.
        num_valid: [B], the patches of each row to choose from, its first ones; None is all.

    Returns:
        indices: [B, keep] int64: those that stay, ascending, then as many others as fit, ascending.
        slots: [B, N] int32, where in `indices` a patch that stays stands; -1 for others.
        counts: [B, 1] int64, how many stay: keep / N of the valid ones, at least one.
    """
    patches = torch.arange(N, device=device)
    valid = torch.full((B, 1), N, device=device)
    if num_valid is not None:
        valid = num_valid.to(torch.int64).clamp(1, N)[:, None]
    counts = ((2 * valid * keep + N) // (2 * N)).clamp_min(1)
    chosen = patches < valid
    if seed is not None and keep < N:
        rows = torch.arange(B, device=device)[:, None] << 32
        words = random_words(seed, rows + patches)
        ranked = words * N + patches  # equal words: the lower patch wins
        ranked = ranked.masked_fill(~chosen, torch.iinfo(torch.int64).max)
        chosen = ranked <= ranked.sort(dim=1).values.gather(1, counts - 1)
    indices = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :keep].contiguous()
    slots = torch.where(chosen, chosen.cumsum(1) - 1, -1).to(torch.int32)
    return indices, slots, counts


def places(indices: Tensor, counts: Tensor, H: int) -> tuple[Tensor, Tensor]:
    """Codes and mask of a choice, as `embed_patches` gives them."""
    codes = indices // H * (2 * H - 1) + indices % H
    key_mask = torch.arange(indices.shape[1], device=indices.device) < counts
    return codes.to(torch.int32), key_mask


def take_patches(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """out[b, i] = x[b, index[b, i]], or zeros where the index is negative. `inverse` is the index
    that undoes it, for its gradient."""
    taken = x.gather(1, index.clamp_min(0).to(torch.int64)[:, :, None].expand(-1, -1, x.shape[2]))
    return taken.masked_fill((index < 0)[:, :, None], 0)


def tokens_and_places(
    spectrogram: Tensor,
    num_valid: Tensor | None,
    seed: Tensor | None,
    keep: int,
    patch_size: int,
    patch_norm_weight: Tensor,
    patch_norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, indices, codes and mask as `embed_patches` gives them, and the slots of the choice."""
    B, W, H = _grid(spectrogram, patch_size)
    device = spectrogram.device
    indices, slots, counts = choose_patches(seed, num_valid, B, W * H, keep, device)
    codes, key_mask = places(indices, counts, H)

    wide = torch.promote_types(spectrogram.dtype, torch.float32)
    norm = (patch_norm_weight.to(wide), patch_norm_bias.to(wide))
    x = _patches(spectrogram, patch_size, indices).to(wide)
    x = F.layer_norm(x, x.shape[-1:], *norm, EPSILON)
    x = F.linear(x, weight.to(wide), bias.to(wide))
    x = F.layer_norm(x, x.shape[-1:], norm_weight.to(wide), norm_bias.to(wide), EPSILON)
    x = x + _positions(W, H, x.shape[-1], wide, device)[indices]
    tokens = x.to(dtype)
    if num_valid is not None:
        tokens = tokens.masked_fill(~key_mask[:, :, None], 0)
    return tokens, indices, codes, key_mask, slots


def tokens_backward(
    grad_tokens: Tensor,
    spectrogram: Tensor,
    indices: Tensor,
    key_mask: Tensor,
    slots: Tensor,
    patch_size: int,
    patch_norm_weight: Tensor,
    patch_norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    wants_spectrogram: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the spectrogram, empty unless wanted, and of the six parameters."""
    _, W, H = _grid(spectrogram, patch_size)
    parameters = (patch_norm_weight, patch_norm_bias, weight, bias, norm_weight, norm_bias)
    wide = torch.promote_types(spectrogram.dtype, torch.float32)
    first_weight, first_bias, wide_weight, wide_bias, second_weight, second_bias = (
        parameter.to(wide) for parameter in parameters
    )
    x = _patches(spectrogram, patch_size, indices).to(wide).flatten(0, 1)
    first = (x.shape[-1:], first_weight, first_bias, EPSILON)
    normed, *first_statistics = torch.native_layer_norm(x, *first)
    y = F.linear(normed, wide_weight, wide_bias)
    _, *second_statistics = torch.native_layer_norm(
        y, y.shape[-1:], second_weight, second_bias, EPSILON
    )

    grad = grad_tokens.to(wide).masked_fill(~key_mask[:, :, None], 0).flatten(0, 1)
    norm_backward = torch.ops.aten.native_layer_norm_backward
    every = (True, True, True)
    grad_y, grad_second_weight, grad_second_bias = norm_backward(
        grad, y, y.shape[-1:], *second_statistics, second_weight, second_bias, every
    )
    grad_x, grad_first_weight, grad_first_bias = norm_backward(
        grad_y @ wide_weight, x, x.shape[-1:], *first_statistics, first_weight, first_bias, every
    )
    grad_spectrogram = spectrogram.new_empty(0)
    if wants_spectrogram:
        of_all = take_patches(grad_x.unflatten(0, indices.shape), slots, indices)  # [B, N, P * P]
        of_all = of_all.unflatten(2, (patch_size, patch_size)).unflatten(1, (W, H))
        of_all = of_all.permute(0, 1, 4, 2, 3)  # [B, W, frame, H, bin]
        grad_spectrogram = of_all.reshape(spectrogram.shape).to(spectrogram.dtype)
    gradients = (
        grad_first_weight, grad_first_bias, grad_y.mT @ normed, grad_y.sum(0),
        grad_second_weight, grad_second_bias,
    )  # fmt: skip
    return grad_spectrogram, *(g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True))


def _grid(spectrogram: Tensor, patch_size: int) -> tuple[int, int, int]:
    B, num_frames, num_bins = spectrogram.shape
    return B, num_frames // patch_size, num_bins // patch_size


def _patches(spectrogram: Tensor, patch_size: int, indices: Tensor) -> Tensor:
    """These patches, [B, K, P * P]: of each the frames of its first bin, of its second, and so on."""
    grid = spectrogram.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size))
    patches = grid.permute(0, 1, 3, 4, 2).flatten(3).flatten(1, 2)  # [B, N, P * P]
    b = torch.arange(len(indices), device=indices.device)[:, None]
    return patches[b, indices]


def _positions(W: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, D]: sines, then cosines of D / 4 frequencies at the column, and the same at the row."""
    frequencies = BASE ** -torch.linspace(0, 1, D // 4, dtype=dtype, device=device)
    patches = torch.arange(W * H, device=device)[:, None]
    x, y = patches // H * frequencies, patches % H * frequencies
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)
