"""Unit queries and keys as a PyTorch op: schema, shape rule, autograd, and the public function."""

from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, check_device, check_dims, check_dtype, check_shape
from musiclm_kernels.layout import empty_rows_like
from musiclm_kernels.qk_l2norm import reference
from musiclm_kernels.registry import define_op, refuse_to_differentiate

MAX_D = 256  # the kernel holds whole rows in registers, and has been compiled up to here


def _fake(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows_like(q), empty_rows_like(k)


def _fake_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k = empty_rows_like(q), empty_rows_like(k)
    return grad_q, grad_k, q_scale.new_empty(q_scale.shape), k_scale.new_empty(k_scale.shape)


_qk_l2norm = define_op(
    "qk_l2norm",
    "(Tensor q, Tensor k, Tensor q_scale, Tensor k_scale) -> (Tensor, Tensor)",
    reference.qk_l2norm,
    _fake,
    kernel="musiclm_kernels.qk_l2norm.kernel:qk_l2norm",
)
_qk_l2norm_backward = define_op(
    "qk_l2norm_backward",
    "(Tensor grad_q_out, Tensor grad_k_out, Tensor q, Tensor k, Tensor q_scale, Tensor k_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.qk_l2norm_backward,
    _fake_backward,
    kernel="musiclm_kernels.qk_l2norm.kernel:qk_l2norm_backward",
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    # The lengths are not saved: the backward pass reads q and k whole in any case, and a row's sum
    # of squares is then a few instructions, where the saved lengths would be one more tensor.
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_q_out: Tensor, grad_k_out: Tensor) -> tuple[Tensor, ...]:
    return _qk_l2norm_backward(grad_q_out, grad_k_out, *ctx.saved_tensors)


torch.library.register_autograd("musiclm::qk_l2norm", _backward, setup_context=_setup_context)
refuse_to_differentiate("qk_l2norm_backward")


def qk_l2norm(q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of unit length, times a learned scale for each dimension:

        q'[b, h, n] = q[b, h, n] / max(|q[b, h, n]|, 1e-12) * q_scale[h], and the same for k

    One pass before attention, whose scores are then bounded by the scales. Reads q and k through
    their strides and writes in their layout, so that a projection [B, N, H, D] viewed as
    [B, H, N, D] is copied neither before nor after. Differentiable, once, in all four; the scales'
    gradients are the same bits on every run, and a zero row's is what autograd of the formula
    gives: its length is the constant 1e-12.

    Args:
        q: [B, H, N, D], any float dtype, D from 1 to 256.
        k: [B, Hkv, M, D], q's dtype.
        q_scale: [D], or [H, D] for a scale of each head; float32 or q's dtype.
        k_scale: [D], or [Hkv, D]; float32 or q's dtype.

    Returns:
        q' [B, H, N, D] and k' [B, Hkv, M, D] in q's dtype, each in the layout of its input without
        the gaps; packed where the input's last stride is not 1. The same goes for gradients. Every
        sum runs in fp32, or fp64 for float64 inputs, and each element is rounded once.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
        RuntimeError: a gradient of the gradient is asked for.

    Source: cosine attention, Swin Transformer V2 (arXiv 2111.09883, section 3.2), with the scales
    per dimension of ViT-22B's query and key norm (arXiv 2302.05442, section 2).
    """
    check_dims("q", q, "B H N D")
    check_dtype("q", q, *FLOATS)
    B, H, _, D = q.shape
    if not 1 <= D <= MAX_D:
        raise ValueError(f"q has width {D}, wanted 1 to {MAX_D}")
    check_dims("k", k, "B Hkv M D")
    check_shape("k", k, B, k.shape[1], k.shape[2], D)
    check_dtype("k", k, q.dtype)
    check_device("k", k, q.device)
    for name, scale, num_heads in (("q_scale", q_scale, H), ("k_scale", k_scale, k.shape[1])):
        if scale.shape not in ((D,), (num_heads, D)):
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}, wanted {(D,)} or {(num_heads, D)}"
            )
        check_dtype(name, scale, torch.float32, q.dtype)
        check_device(name, scale, q.device)
    return _qk_l2norm(q, k, q_scale, k_scale)
