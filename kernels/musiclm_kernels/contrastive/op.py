"""The contrastive losses as a PyTorch op: schema, shape rule, autograd, the public function."""

import math
from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, check_device, check_dims, check_dtype, check_shape
from musiclm_kernels.contrastive import reference
from musiclm_kernels.registry import define_op, refuse_to_differentiate

KINDS = ("softmax", "decoupled", "sigmoid")


def _reference(
    audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, kind: str
) -> Tensor:
    return reference.contrastive_loss(audio, text, temperature, kind=kind, bias=bias)


def _fake(audio: Tensor, *_: Any) -> Tensor:
    return audio.new_empty((), dtype=torch.promote_types(audio.dtype, torch.float32))


def _fake_backward(
    grad: Tensor, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = (temperature if bias is None else bias).new_empty(())
    return (
        audio.new_empty(audio.shape),
        text.new_empty(text.shape),
        temperature.new_empty(()),
        grad_bias,
    )


_contrastive_loss = define_op(
    "contrastive_loss",
    "(Tensor audio, Tensor text, Tensor temperature, Tensor? bias, str kind) -> Tensor",
    _reference,
    _fake,
)
_contrastive_loss_backward = define_op(
    "contrastive_loss_backward",
    "(Tensor grad, Tensor audio, Tensor text, Tensor temperature, Tensor? bias, str kind) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference.contrastive_loss_backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    audio, text, temperature, bias, kind = inputs
    ctx.save_for_backward(audio, text, temperature, bias)
    ctx.kind = kind


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    audio, text, temperature, bias = ctx.saved_tensors
    *grads, grad_bias = _contrastive_loss_backward(grad, audio, text, temperature, bias, ctx.kind)
    return (*grads, None if bias is None else grad_bias, None)


torch.library.register_autograd(
    "musiclm::contrastive_loss", _backward, setup_context=_setup_context
)
refuse_to_differentiate("contrastive_loss_backward")


def contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: float | Tensor,
    *,
    kind: str = "softmax",
    bias: float | Tensor | None = None,
) -> Tensor:
    """The contrastive loss of B pairs, of s = temperature * audio text^T:

        softmax    mean of the two cross-entropies, audio to text and text to audio
        decoupled  the same with each pair's own score left out of both denominators
        sigmoid    -sum_ij log sigmoid(z_ij (s_ij + bias)) / B, z = +1 on the diagonal, else -1

    Differentiable, once, in audio, text, temperature and bias. Rows are not normalised here.

    Args:
        audio: [B, D], any float dtype.
        text: [B, D], audio's dtype; row i belongs to row i of audio.
        temperature: a float above 0, or a float tensor of no dimensions, whose value is not looked
            at (that would synchronise); multiplies.
        kind: "softmax", "decoupled" or "sigmoid".
        bias: a float or a float tensor of no dimensions; for sigmoid only, where None is 0.

    Returns:
        A tensor of no dimensions, float32, or float64 for float64 inputs; every sum runs in that.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above; no pairs, or one pair
            with "decoupled", which compares with other pairs only; a bias without "sigmoid"; a temperature that is no
            finite float above 0.
        RuntimeError: a gradient of the gradient is asked for.

    Source: softmax: CLIP (arXiv 2103.00020, figure 3); decoupled: Yeh et al., arXiv 2110.06848,
    equation 6; sigmoid: SigLIP (arXiv 2303.15343, equation 1).
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, wanted one of {KINDS}")
    check_dims("audio", audio, "B D")
    check_dtype("audio", audio, *FLOATS)
    check_shape("text", text, *audio.shape)
    check_dtype("text", text, audio.dtype)
    check_device("text", text, audio.device)
    least = 2 if kind == "decoupled" else 1
    if audio.shape[0] < least:
        raise ValueError(f"audio has {audio.shape[0]} rows, wanted at least {least} for {kind}")
    if bias is not None and kind != "sigmoid":
        raise ValueError(f"bias is given with kind {kind!r}, wanted None: only sigmoid reads it")
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, wanted a finite number above 0")
    scalar = _as_scalar("temperature", temperature, audio)
    shift = None if bias is None else _as_scalar("bias", bias, audio)
    return _contrastive_loss(audio, text, scalar, shift, kind)


def _as_scalar(name: str, value: float | Tensor, audio: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        wide = torch.promote_types(audio.dtype, torch.float32)
        return torch.full((), value, dtype=wide, device=audio.device)
    check_shape(name, value)
    check_dtype(name, value, *FLOATS)
    check_device(name, value, audio.device)
    return value
