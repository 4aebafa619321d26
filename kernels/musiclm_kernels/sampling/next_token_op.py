"""The end of a decode step as a PyTorch op: schema, shape rule, and the public function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musiclm_kernels.checks import (
    check_device,
    check_dims,
    check_dtype,
    check_finite,
    check_shape,
)
from musiclm_kernels.registry import define_op, inlines_on_cpu, without_autocast
from musiclm_kernels.sampling import next_token_reference as reference
from musiclm_kernels.sampling.op import check_filters

WHOLE_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
EIGHT_BIT_WEIGHTS = (torch.int8, torch.float8_e4m3fn)
INT8_BLOCK = 32  # columns that aten's int8 product takes at a time; it reads past others
# Scales for that product, which knows bfloat16 ones only. Inductor wants them to outlive the call.
ONES = torch.ones(1 << 16, dtype=torch.bfloat16)


def _quick_product(x: Tensor, weight: Tensor, weight_scale: Tensor | None) -> Tensor:
    """The product on a CPU, where it takes the time of reading the weights: those of bfloat16 and
    int8 are multiplied as they are, by bfloat16 activations, and the logits rounded to bfloat16."""
    is_int8 = weight.dtype == torch.int8 and weight.shape[1] % INT8_BLOCK == 0
    is_int8 = is_int8 and len(weight) <= len(ONES)
    if x.is_cuda or x.dtype == torch.float64 or not (weight.dtype == torch.bfloat16 or is_int8):
        return reference.exact_product(x, weight, weight_scale)
    rounded = x.to(torch.bfloat16)
    if is_int8:
        product = torch._weight_int8pack_mm(rounded, weight, ONES[: len(weight)])
    else:
        product = F.linear(rounded, weight)
    product = product.to(x.dtype)
    return product if weight_scale is None else product * weight_scale


def _body(*arguments: Any) -> Tensor:
    return reference.next_token(_quick_product, *arguments[:-1])  # without the counters


def _fake(*arguments: Any) -> Tensor:
    return arguments[8].new_empty(arguments[8].shape)


_sample_next_token = define_op(
    "sample_next_token",
    "(Tensor(a!) x, Tensor norm_weight, Tensor? norm_bias, Tensor head_weight, Tensor embedding, "
    "Tensor? head_scale, Tensor? head_bias, Tensor step, Tensor seeds, float temperature, "
    "SymInt top_k, float top_p, float min_p, float? guidance_scale, Tensor? allowed, SymInt? eos, "
    "SymInt eos_from, Tensor(b!)? finished, Tensor(c!)? counters) -> Tensor",
    _body,
    _fake,
    kernel="musiclm_kernels.sampling.next_token:sample_next_token",
)


def sample_next_token(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    embedding: Tensor,
    *,
    head_scale: Tensor | None = None,
    head_bias: Tensor | None = None,
    step: Tensor,
    seeds: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    guidance_scale: float | None = None,
    allowed: Tensor | None = None,
    eos: int | None = None,
    eos_from: int = 0,
    finished: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """The last launch of a decode step: from the residual stream to a token a row, and from the
    tokens to the next step's residual stream.

        hidden = LayerNorm(sum over streams of x)          level = step % L
        logits = hidden @ head_weight[level].T * head_scale[level] + head_bias[level]
        token  = sample_logits(logits[:B], unconditional=logits[B:], allowed=allowed[level], ...)
        x[b], and its twin x[B + b], and each stream of both = embedding[level, token]

    On CUDA one launch: a program each few tokens of the vocabulary, and the last of them to finish
    draws. Row b depends on its rows of x, seeds[b] and step, bit for bit on nothing else. The
    sums over D may round differently from device to device; from the logits on every device finds
    the same token. Not differentiable.

    Args:
        x: [R, D] or, of s streams, [R, s, D]; float32, packed, overwritten. R is B, or 2 B with
            guidance_scale: the last B rows are the twins without the condition.
        norm_weight, norm_bias: [D]; of the LayerNorm, whose epsilon is 1e-5.
        head_weight: [L, V, D] float32, float16, bfloat16, or int8 or float8_e4m3fn with head_scale.
        embedding: [L, V', D] float32, float16 or bfloat16; V' >= V.
        head_scale: [L, V] float32, of eight-bit weights alone.
        head_bias: [L, V], float32.
        step: [] int64 on the device, 0 or more; its value is not looked at.
        seeds: [B] int64.
        temperature, top_k, top_p, min_p: as `sample_logits` has them.
        guidance_scale: finite; as `sample_logits` has it.
        allowed: [L, V] bool, True where a token may be drawn.
        eos: the token that ends a row, not drawn before step eos_from.
        finished: [B] bool, overwritten: a row that is finished gives eos, and one that draws eos
            is finished. Needs eos.
            Weights, norms, scales, biases, finished and x are packed, and the weights were written
            by no launch right before this one, which on CUDA may begin while that one still runs.
        counters: [1] int32, zero before and after, of no two calls that can run at the same time;
            None makes one, at the cost of a launch.

    Returns:
        [B] int64. Sums run in fp32, and top_p's as `sample_logits` says. On a CPU bfloat16 and int8
        weights take activations rounded to bfloat16, and give logits rounded so.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above, or a number is
            outside its range; on CUDA, V above 8192 or D above 4096.

    Source: the draw as `sample_logits` has it; that the last program to finish does it: NVIDIA's CUDA
    sample threadFenceReduction.
    """
    check_dims("head_weight", head_weight, "L V D")
    L, V, D = head_weight.shape
    if head_weight.numel() == 0:
        raise ValueError(f"head_weight has shape {(L, V, D)}, wanted no empty dimension")
    check_dims("seeds", seeds, "B")
    B = len(seeds)
    check_filters(temperature, top_k, top_p, min_p)
    if guidance_scale is not None:
        check_finite("guidance_scale", guidance_scale)
    R = B if guidance_scale is None else 2 * B
    if x.dim() not in (2, 3) or x.shape[0] != R or x.shape[-1] != D or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted {(R, D)} or ({R}, s, {D})")
    check_dtype("x", x, torch.float32)
    eight_bits = head_weight.dtype in EIGHT_BIT_WEIGHTS
    check_dtype("head_weight", head_weight, *WHOLE_WEIGHTS, *EIGHT_BIT_WEIGHTS)
    if eight_bits != (head_scale is not None):
        wanted = "[L, V] float32" if eight_bits else "None"
        raise ValueError(f"head_scale is {head_scale}, wanted {wanted} beside {head_weight.dtype}")
    check_dims("embedding", embedding, "L V' D")
    if embedding.shape[0] != L or embedding.shape[1] < V or embedding.shape[2] != D:
        raise ValueError(
            f"embedding has shape {tuple(embedding.shape)}, wanted ({L}, {V} or more, {D})"
        )
    check_dtype("embedding", embedding, *WHOLE_WEIGHTS)
    if eos is None and finished is not None:
        raise ValueError("eos is None, wanted the token that finishes a row")
    if eos is not None and not 0 <= eos < V:
        raise ValueError(f"eos is {eos}, wanted 0 to {V - 1}")
    floats, parameters = (torch.float32,), WHOLE_WEIGHTS
    for name, tensor, dtypes, shape in (
        ("norm_weight", norm_weight, parameters, (D,)),
        ("norm_bias", norm_bias, parameters, (D,)),
        ("head_scale", head_scale, floats, (L, V)),
        ("head_bias", head_bias, floats, (L, V)),
        ("step", step, (torch.int64,), ()),
        ("seeds", seeds, (torch.int64,), (B,)),
        ("allowed", allowed, (torch.bool,), (L, V)),
        ("finished", finished, (torch.bool,), (B,)),
        ("counters", counters, (torch.int32,), (1,)),
    ):
        if tensor is not None:
            check_shape(name, tensor, *shape)
            check_dtype(name, tensor, *dtypes)
            check_device(name, tensor, x.device)
    for name, tensor in (("head_weight", head_weight), ("embedding", embedding)):
        check_device(name, tensor, x.device)
    # x and finished are written in place. The rest the kernel reads before the one ahead of it has
    # ended: a copy made for it would not be there yet.
    for name, tensor in (
        ("x", x),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("head_weight", head_weight),
        ("embedding", embedding),
        ("head_scale", head_scale),
        ("head_bias", head_bias),
        ("finished", finished),
    ):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, wanted a packed tensor")
    run = without_autocast(_body) if inlines_on_cpu(x) else _sample_next_token
    with torch.no_grad():
        return run(
            x, norm_weight, norm_bias, head_weight, embedding, head_scale, head_bias, step, seeds,
            temperature, top_k, top_p, min_p, guidance_scale, allowed, eos, eos_from, finished,
            counters,
        )  # fmt: skip
