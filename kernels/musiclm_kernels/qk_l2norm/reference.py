"""Queries and keys of unit length with learned scales, in plain PyTorch.

Dimensions: B batch, H query heads, Hkv key heads, N queries, M keys, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.layout import empty_rows_like

EPSILON = 1e-12  # F.normalize's: the least length that is divided by


def qk_l2norm(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor]:
    """q / max(|q|, 1e-12) * q_scale, and the same for k. In at least fp32, rounded once. Laid
    out by `empty_rows_like`, as the gradients are."""
    return _normalize(q, q_scale), _normalize(k, k_scale)


def qk_l2norm_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k, and of both scales."""
    grad_q, grad_q_scale = _normalize_backward(grad_q_out, q, q_scale)
    grad_k, grad_k_scale = _normalize_backward(grad_k_out, k, k_scale)
    return grad_q, grad_k, grad_q_scale, grad_k_scale


def _normalize(x: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    out = F.normalize(x.to(wide), dim=-1, eps=EPSILON) * _per_row(scale).to(wide)
    return empty_rows_like(x).copy_(out)


def _normalize_backward(grad_out: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_out, wide_x = grad_out.to(wide), x.to(wide)
    norm = wide_x.norm(dim=-1, keepdim=True)
    length = norm.clamp_min(EPSILON)
    unit = wide_x / length

    grad_unit = grad_out * _per_row(scale).to(wide)
    along = (grad_unit * unit).sum(-1, keepdim=True)
    # Where the clamp holds, the length does not follow x.
    along = along.masked_fill(norm < EPSILON, 0.0)
    grad_x = empty_rows_like(x).copy_((grad_unit - along * unit) / length)

    shared = (0, 2) if scale.dim() == 2 else (0, 1, 2)
    return grad_x, (grad_out * unit).sum(shared).to(scale.dtype)


def _per_row(scale: Tensor) -> Tensor:
    """[D] as it is; [H, D] as [H, 1, D]."""
    return scale.unsqueeze(-2) if scale.dim() == 2 else scale
