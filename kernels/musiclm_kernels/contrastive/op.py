"""The contrastive losses as PyTorch ops: schema, shape rule, autograd, the public functions."""

import math
from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, check_device, check_dims, check_dtype, check_shape
from musiclm_kernels.contrastive import blocked
from musiclm_kernels.registry import define_op, refuse_to_differentiate

KINDS = ("softmax", "decoupled", "sigmoid")


def _fake(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    L, wide = audio.shape[0], torch.promote_types(audio.dtype, torch.float32)
    shapes = ((L,), (0 if kind == "sigmoid" else 4, L, count), (2, L))
    losses, log_sums, slopes = (audio.new_empty(shape, dtype=wide) for shape in shapes)
    return losses, log_sums, slopes


def _fake_gradient(
    grad: Tensor,
    audio: Tensor,
    text: Tensor,
    log_sums: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    shape = (audio.shape[0], count, audio.shape[2])
    return audio.new_empty(shape), text.new_empty(shape)


# The loss of all pairs is the share of the range of all; only then is it differentiable.
_statistics = define_op(
    "contrastive_loss",
    "(Tensor audio, Tensor text, Tensor temperature, Tensor? bias, str kind, SymInt first, "
    "SymInt count) -> (Tensor, Tensor, Tensor)",
    blocked.contrastive_statistics,
    _fake,
    kernel="musiclm_kernels.contrastive.kernel:contrastive_statistics",
)
_gradient = define_op(
    "contrastive_gradient",
    "(Tensor grad, Tensor audio, Tensor text, Tensor log_sums, Tensor temperature, Tensor? bias, "
    "str kind, SymInt first, SymInt count) -> (Tensor, Tensor)",
    blocked.contrastive_gradient,
    _fake_gradient,
    kernel="musiclm_kernels.contrastive.kernel:contrastive_gradient",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    audio, text, temperature, bias, kind, first, count = inputs
    _, log_sums, slopes = output
    ctx.mark_non_differentiable(log_sums, slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(audio, text, log_sums, temperature, bias, slopes)
    ctx.kind, ctx.first, ctx.count = kind, first, count


class _NotTwice(torch.autograd.Function):
    """A derivative, as one of tensors that it is a constant to: autograd would take it for one."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, *_: Tensor) -> Tensor:
        return derivative.view_as(derivative)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("musiclm::contrastive_loss cannot be differentiated twice")


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    audio, text, log_sums, temperature, bias, slopes = ctx.saved_tensors
    grad_audio, grad_text = _gradient(
        grad, audio, text, log_sums, temperature, bias, ctx.kind, ctx.first, ctx.count
    )
    by_temperature = _NotTwice.apply(
        (grad * slopes[0]).to(temperature.dtype), audio, text, temperature
    )
    by_bias = None
    if bias is not None:
        by_bias = _NotTwice.apply((grad * slopes[1]).to(bias.dtype), audio, text, temperature)
    return grad_audio, grad_text, by_temperature, by_bias, None, None, None


torch.library.register_autograd(
    "musiclm::contrastive_loss", _backward, setup_context=_setup_context
)
refuse_to_differentiate("contrastive_gradient")


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

    No tensor of B * B elements exists: scores are computed again for the gradients. Differentiable,
    once, in audio, text, temperature and bias, and the same bits on every run. Rows are not
    normalised here. For pairs that are spread over processes see `contrastive_statistics`.

    Args:
        audio: [B, D], any float dtype; or [L, B, D], a loss for each of L layers.
        text: audio's shape and dtype; row i belongs to row i of audio.
        temperature: a float above 0, or a float tensor, of no dimensions or [L], whose values are
            not looked at (that would synchronise); multiplies.
        kind: "softmax", "decoupled" or "sigmoid".
        bias: a float or a float tensor, of no dimensions or [L]; for sigmoid only, where None is 0.

    Returns:
        A tensor of no dimensions, or [L] for layers: float32, or float64 for float64 inputs. Every
        sum runs in that. On CUDA, the products of float32 inputs are exact unless
        torch.set_float32_matmul_precision is lower than "highest": then they are tf32; and
        gradients of float16 and bfloat16 inputs are sums of products of that type, as PyTorch's own.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above; no pairs, or one pair
            with "decoupled", which compares with other pairs only; a bias without "sigmoid"; a
            temperature that is no finite float above 0.
        RuntimeError: a gradient of the gradient is asked for.

    Source: softmax: CLIP (arXiv 2103.00020, figure 3); decoupled: Yeh et al., arXiv 2110.06848,
    equation 6; sigmoid: SigLIP (arXiv 2303.15343, equation 1). Layers: ViCHA (arXiv 2208.13628).
    """
    if audio.dim() != 3:
        check_dims("audio", audio, "B D")
    _check(audio, text, kind)
    if bias is not None and kind != "sigmoid":
        raise ValueError(f"bias is given with kind {kind!r}, wanted None: only sigmoid reads it")
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, wanted a finite number above 0")
    scale = _of_layers("temperature", temperature, audio)
    shift = None if bias is None else _of_layers("bias", bias, audio)
    if audio.dim() == 3:
        return _statistics(audio, text, scale, shift, kind, 0, audio.shape[1])[0]
    return _statistics(audio[None], text[None], scale, shift, kind, 0, len(audio))[0].squeeze(0)


def contrastive_statistics(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `count` pairs add to the loss of all B, for a batch that is spread over processes.

    Each process gathers all pairs, calls this for its own, gathers the log-sums, and calls
    `contrastive_gradient`: the work of each is count / B of the whole. Not differentiable.

    Args:
        audio: [L, B, D], any float dtype, the pairs of all processes.
        text: audio's shape and dtype.
        temperature: [L], any float dtype.
        kind: as in `contrastive_loss`.
        bias: [L] or None.
        first: where the own pairs begin.
        count: how many there are.

    Returns:
        losses: [L], shares that add up to the loss over disjoint ranges of pairs.
        log_sums: [4, L, count]: log sum_j exp s of the own audio rows and text rows, then the share
            of each sum that other pairs have (1 for decoupled); of no elements ([0, L, count]) for
            sigmoid, which needs none.
        slopes: [2, L], the derivatives of the shares by temperature and bias; they add up, too.
        All float32, or float64 for float64 inputs.

    Raises:
        ValueError: as `contrastive_loss`; or a range that is not within the B pairs.

    Source: this project's; the gradient by recomputed scores as in FlashAttention-2 (arXiv
    2307.08691, section 3.2).
    """
    _check_range(audio, text, temperature, kind, bias, first, count)
    with torch.no_grad():
        losses, log_sums, slopes = _statistics(audio, text, temperature, bias, kind, first, count)
    return losses, log_sums, slopes


def contrastive_gradient(
    grad: Tensor,
    audio: Tensor,
    text: Tensor,
    log_sums: Tensor,
    temperature: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of `count` rows of audio and of text, of the loss over all B pairs.

    Exact: it holds what the rows do to the other rows' terms, too. Not differentiable.

    Args:
        grad: [L], of the losses.
        audio, text, temperature, kind, bias, first, count: as in `contrastive_statistics`.
        log_sums: [4, L, B] of all pairs, or [0, L, B] for sigmoid.

    Returns:
        [L, count, D] of audio and of text, in their dtype.

    Raises:
        ValueError: as `contrastive_statistics`; or log_sums or grad of another shape.

    Source: see `contrastive_statistics`.
    """
    _check_range(audio, text, temperature, kind, bias, first, count)
    L, B, _ = audio.shape
    check_shape("grad", grad, L)
    for name, given in (("grad", grad), ("log_sums", log_sums)):
        check_dtype(name, given, torch.promote_types(audio.dtype, torch.float32))
    check_shape("log_sums", log_sums, 0 if kind == "sigmoid" else 4, L, B)
    with torch.no_grad():
        grad_audio, grad_text = _gradient(
            grad, audio, text, log_sums, temperature, bias, kind, first, count
        )
    return grad_audio, grad_text


def _check(audio: Tensor, text: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, wanted one of {KINDS}")
    check_dtype("audio", audio, *FLOATS)
    check_shape("text", text, *audio.shape)
    check_dtype("text", text, audio.dtype)
    check_device("text", text, audio.device)
    num_pairs, least = audio.shape[-2], 2 if kind == "decoupled" else 1
    if num_pairs < least:
        raise ValueError(f"audio has {num_pairs} rows, wanted at least {least} for {kind}")


def _check_range(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    kind: str,
    bias: Tensor | None,
    first: int,
    count: int,
) -> None:
    check_dims("audio", audio, "L B D")
    _check(audio, text, kind)
    if bias is not None and kind != "sigmoid":
        raise ValueError(f"bias is given with kind {kind!r}, wanted None: only sigmoid reads it")
    for name, value in (("temperature", temperature), ("bias", bias)):
        if value is not None:
            check_shape(name, value, audio.shape[0])
            check_dtype(name, value, *FLOATS)
            check_device(name, value, audio.device)
    if not 0 <= first <= first + count <= audio.shape[1]:
        raise ValueError(
            f"first is {first} and count {count}, wanted a range of the {audio.shape[1]} pairs"
        )


def _of_layers(name: str, value: float | Tensor, audio: Tensor) -> Tensor:
    """[L], of a number or of a tensor of no dimensions, or what is [L] already."""
    num_layers = audio.shape[0] if audio.dim() == 3 else 1
    if not isinstance(value, Tensor):
        wide = torch.promote_types(audio.dtype, torch.float32)
        return torch.full((num_layers,), value, dtype=wide, device=audio.device)
    if audio.dim() == 3 and value.dim() == 1:
        check_shape(name, value, num_layers)
    else:
        check_shape(name, value)
    check_dtype(name, value, *FLOATS)
    check_device(name, value, audio.device)
    return value.expand(num_layers)
