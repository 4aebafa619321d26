"""What reaches the input of a residual quantiser from its output, which has no derivative."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclm_kernels import rvq_decode

SMALLEST_LENGTH = 1e-6  # what a length is divided by where it is less


def quantize_with_gradient(
    x: Tensor, codes: Tensor, codebooks: Tensor, *, rotation: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the chosen codes, and how far each level's code is from what it stands for.

    With r_q what the levels before q left of x, and c_q the code of level q, the input's gradient is

        rotation:          sum_q lambda_q R_q^T g,  lambda_q = |c_q| / |r_q|
        straight through:  sum_q g, that is, g times the number of levels that a row has codes of

    where R_q turns r_q into the direction of c_q: I - 2 w w^T + 2 v u^T, u and v the directions of
    r_q and c_q, w that of u + v (Fifty et al., arXiv 2410.06424, section 4.2). Each level counts
    whole, since r_q is x minus a constant. The forward value is the codes' sum itself.

    Args:
        x: [N, D] float32 or float64.
        codes: [N, Q] int64; a level adds nothing where its code is -1.
        codebooks: [Q, K, D] in x's dtype; they may be written to afterwards.
        rotation: which of the two gradients.

    Returns:
        quantized [N, D], and errors [Q]: over the rows that have a code at a level, the mean of
        (c_q - r_q)^2, whose gradient goes to x; 0 where no row has one.
    """
    if x.requires_grad:
        codebooks = _snapshot(codebooks)
    return _QuantizeWithGradient.apply(x, codes, codebooks, rotation)


def _snapshot(codebooks: Tensor) -> Tensor:
    """A copy, for a training step moves the codebooks before the backward pass reads them.

    For torch.compile by an op that it cannot look into: a plain copy it puts off until the backward
    pass, where it copies what has moved by then (torch 2.13; see docs/decisions/0006).
    """
    if not torch.compiler.is_compiling():
        return codebooks.clone()
    every_code = torch.arange(codebooks[..., 0].numel(), device=codebooks.device)[:, None]
    return rvq_decode(every_code, codebooks.reshape(1, -1, codebooks.shape[2])).view_as(codebooks)


class _QuantizeWithGradient(torch.autograd.Function):
    """Keeps x, the codes and the codebooks, and finds the residuals again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, codebooks: Tensor, rotation: bool
    ) -> tuple[Tensor, Tensor]:
        quantized, residual, errors = torch.zeros_like(x), x, []
        for level in range(codes.shape[1]):
            has_code = codes[:, level] >= 0
            chosen = _chosen(codebooks, codes, level)
            quantized += chosen
            residual = residual - chosen
            squares = residual.square().sum(1).where(has_code, 0.0).sum()
            errors.append(squares / _num_values(has_code, x))
        ctx.save_for_backward(x, codes, codebooks)
        ctx.rotation = rotation
        return quantized, torch.stack(errors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, error_gradients = gradients
        x, codes, codebooks = ctx.saved_tensors
        total, residual = torch.zeros_like(x), x
        for level in range(codes.shape[1]):
            has_code = codes[:, level] >= 0
            chosen = _chosen(codebooks, codes, level)
            if ctx.rotation:
                total += _turned_back(gradient, residual, chosen)
            else:
                total += gradient * has_code[:, None]
            residual = residual - chosen
            weight = 2 * error_gradients[level] / _num_values(has_code, x)
            total += residual * (weight * has_code)[:, None]
        return total, None, None, None


def _turned_back(gradient: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """lambda R^T gradient, with R the rotation of source [N, D] to target [N, D]."""
    length = torch.linalg.vector_norm(source, dim=1, keepdim=True).clamp_min(SMALLEST_LENGTH)
    wanted = torch.linalg.vector_norm(target, dim=1, keepdim=True)
    u, v = source / length, target / wanted.clamp_min(SMALLEST_LENGTH)
    w = F.normalize(u + v, dim=1, eps=SMALLEST_LENGTH)
    along_w = (w * gradient).sum(1, keepdim=True)
    along_v = (v * gradient).sum(1, keepdim=True)
    return (gradient - 2 * along_w * w + 2 * along_v * u) * (wanted / length)


def _chosen(codebooks: Tensor, codes: Tensor, level: int) -> Tensor:
    index = codes[:, level]
    return codebooks[level][index.clamp_min(0)] * (index >= 0)[:, None]


def _num_values(has_code: Tensor, x: Tensor) -> Tensor:
    return has_code.sum().clamp_min(1) * x.shape[1]
