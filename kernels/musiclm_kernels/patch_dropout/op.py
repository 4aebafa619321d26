"""Patch dropout as a PyTorch op: schema, shape rule, autograd, and the public function."""

from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, check_dims, check_dtype
from musiclm_kernels.patch_dropout import reference
from musiclm_kernels.registry import define_op


def _reference(x: Tensor, keep: int, seed: int) -> tuple[Tensor, Tensor]:
    return reference.drop_patches(x, keep, seed=seed)


def _fake(x: Tensor, keep: int, seed: int) -> tuple[Tensor, Tensor]:
    B, _, D = x.shape
    return x.new_empty(B, keep, D), x.new_empty(B, keep, dtype=torch.int64)


_drop_patches = define_op(
    "drop_patches", "(Tensor x, SymInt keep, SymInt seed) -> (Tensor, Tensor)", _reference, _fake
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.num_patches = inputs[0].shape[1]


def _backward(ctx: Any, grad_kept: Tensor, _grad_indices: None) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    B, _, D = grad_kept.shape
    grad_x = grad_kept.new_zeros(B, ctx.num_patches, D)
    return grad_x.scatter(1, indices[:, :, None].expand_as(grad_kept), grad_kept), None, None


torch.library.register_autograd("musiclm::drop_patches", _backward, setup_context=_setup_context)


def drop_patches(x: Tensor, keep: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Keep a random subset of each row's patches: `keep` of N, without replacement, every subset
    equally likely.

    The choice is counter-based: patch n of row b draws the Philox word at (seed, b * N + n), and
    the smallest words stay. PyTorch's generators are neither read nor advanced. Differentiable in
    x: a dropped patch has gradient zero.

    Args:
        x: [B, N, D], any float dtype.
        keep: patches that stay, 1 to N.
        seed: of the choice, an int64; give another one at each step.

    Returns:
        The kept patches [B, keep, D] in x's dtype, and which they were: [B, keep] int64, ascending.

    Raises:
        ValueError: x is not [B, N, D] of floats, or keep is not within 1 to N.

    Source: Patchout (Koutini et al., arXiv 2110.05069, section 2), unstructured.
    """
    check_dims("x", x, "B N D")
    check_dtype("x", x, *FLOATS)
    if not 1 <= keep <= x.shape[1]:
        raise ValueError(f"keep is {keep}, wanted 1 to {x.shape[1]}, the patches of x")
    return _drop_patches(x, keep, seed)
