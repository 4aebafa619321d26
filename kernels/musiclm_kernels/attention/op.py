"""Biased attention as a PyTorch op: schema, shape rule, autograd, and the public function."""

from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.attention import blocked, reference
from musiclm_kernels.checks import (
    FLOATS,
    check_device,
    check_dims,
    check_dtype,
    check_finite,
    check_shape,
)
from musiclm_kernels.layout import empty_rows_like
from musiclm_kernels.registry import define_op, refuse_to_differentiate

_ARGUMENTS = (
    "Tensor? table, Tensor? q_codes, Tensor? k_codes, SymInt offset, bool causal, "
    "Tensor? key_mask, float scale, float dropout, Tensor? dropout_seed, Tensor? score_bound, "
    "SymInt grid_rows"
)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return empty_rows_like(q), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants_table = rest[-1]
    grad_table = (
        table.new_empty(table.shape)
        if wants_table and table is not None
        else lse.new_empty(q.shape[1], 0)
    )
    return empty_rows_like(q), empty_rows_like(k), empty_rows_like(v), grad_table


_attention = define_op(
    "biased_attention",
    f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
    blocked.attention_and_lse,
    _fake,
    kernel="musiclm_kernels.attention.forward:attention_and_lse",
)
_attention_backward = define_op(
    "biased_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}, bool wants_table) -> (Tensor, Tensor, Tensor, Tensor)",
    blocked.attention_backward,
    _fake_backward,
    kernel="musiclm_kernels.attention.backward:attention_backward",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the log-sum has none, and zeros for it would be a launch
    q, k, v, table, q_codes, k_codes, offset, causal, key_mask, scale, *rest = inputs
    dropout, dropout_seed, score_bound, grid_rows = rest
    tensors = (table, q_codes, k_codes, key_mask, dropout_seed, score_bound)
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.offset, ctx.causal, ctx.scale = offset, causal, scale
    ctx.dropout, ctx.grid_rows = dropout, grid_rows


def _backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 14
    q, k, v, out, lse, table, q_codes, k_codes, key_mask, seed, bound = ctx.saved_tensors
    wants_table = ctx.needs_input_grad[3]
    grad_q, grad_k, grad_v, grad_table = _attention_backward(
        grad_out, q, k, v, out, lse, table, q_codes, k_codes, ctx.offset, ctx.causal, key_mask,
        ctx.scale, ctx.dropout, seed, bound, ctx.grid_rows, wants_table,
    )  # fmt: skip
    return (grad_q, grad_k, grad_v, grad_table if wants_table else None) + (None,) * 10


torch.library.register_autograd(
    "musiclm::biased_attention", _backward, setup_context=_setup_context
)
refuse_to_differentiate("biased_attention_backward")


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    table: Tensor | None = None,
    q_codes: Tensor | None = None,
    k_codes: Tensor | None = None,
    offset: int = 0,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    score_bound: Tensor | None = None,
    grid_rows: int = 1,
) -> Tensor:
    """softmax(scale * q k^T + bias) v, with a positional bias read from a small table:

        bias[h, i, j] = table[h, clamp(q_codes[i] - k_codes[j] + offset, 0, T - 1)]

    Differentiable, once, in q, k, v and table; the table's gradient is the same bits on every run.
    A query that sees no key gives zeros and has zero gradients.

    Args:
        q: [B, H, N, D], any float dtype.
        k: [B, Hkv, M, D], q's dtype; H is a multiple of Hkv, and query head h reads key head
            h // (H / Hkv).
        v: [B, Hkv, M, D], q's dtype.
        table: [H, T] float32 (float64 beside float64 queries), or None for no bias.
        q_codes: [B, N] or [1, N] int32 within +-2^30; needed with table and only then.
        k_codes: [B, M] or [1, M] int32 within +-2^30; needed with table and only then.
        offset: added to the difference of the codes.
        causal: query i sees the keys j <= i + M - N, so that the last query sees every key.
        key_mask: [B, M] bool, True where a key may be attended.
        scale: of q k^T, before the bias, finite; 1 / sqrt(D) if None.
        dropout: share in [0, 1) of the weights that become zero, while the others are divided by
            1 - dropout (attention dropout, as in PyTorch's scaled_dot_product_attention).
        dropout_seed: an int, or int64 []; None draws it from torch's generator. Which weights stay
            is Philox of the seed and of their place, the same on every device.
        score_bound: [H] float32, a promise that |scale * q k^T| never exceeds it: with normalised
            queries and keys it does not. The kernel then needs no running maximum. Ignored where
            the bound and the table's range leave less room than fp32 has, and in float16.
        grid_rows: R, where codes are column * (2 R - 1) + row, 0 <= row < R, of tokens on a grid;
            1 for tokens on a line. The gradient of the table is the same for any value; on CUDA it
            is fastest if this is true.

    Returns:
        [B, H, N, D] in q's dtype and layout. Every sum runs in fp32, or fp64 for float64 inputs. On
        CUDA, products of float32 inputs are exact unless torch.set_float32_matmul_precision is
        lower than "highest": then they are tf32.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, a scale is not finite, or
            the table comes without codes, or codes without a table; dropout is outside [0, 1);
            on CUDA, q is wider than 128.
        RuntimeError: a gradient of the gradient is asked for.

    Source: bias design of this project (docs: one bias for every transformer); softmax with a
    saved log-sum as in FlashAttention-2 (arXiv 2307.08691, section 3.1).
    """
    check_dims("q", q, "B H N D")
    check_dtype("q", q, *FLOATS)
    B, H, N, D = q.shape
    check_dims("k", k, "B Hkv M D")
    num_key_heads, M = k.shape[1], k.shape[2]
    if num_key_heads == 0 or H % num_key_heads:
        raise ValueError(f"k has {num_key_heads} heads, wanted a divisor of q's {H}")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, B, num_key_heads, M, D)
        check_dtype(name, tensor, q.dtype)
        check_device(name, tensor, q.device)
    if table is not None:
        _check_table(table, q)
    for name, codes, length in (("q_codes", q_codes, N), ("k_codes", k_codes, M)):
        _check_codes(name, codes, table, B, length, q.device)
    if key_mask is not None:
        check_shape("key_mask", key_mask, B, M)
        check_dtype("key_mask", key_mask, torch.bool)
        check_device("key_mask", key_mask, q.device)
    if scale is not None:
        check_finite("scale", scale)
    scale = D**-0.5 if scale is None else scale
    if score_bound is not None:
        check_shape("score_bound", score_bound, H)
        check_dtype("score_bound", score_bound, torch.float32)
        check_device("score_bound", score_bound, q.device)
    if grid_rows < 1:
        raise ValueError(f"grid_rows is {grid_rows}, wanted at least 1")
    seed = _seed(dropout, dropout_seed, q.device)
    return _attention(
        q, k, v, table, q_codes, k_codes, offset, causal, key_mask, scale,
        dropout, seed, score_bound, grid_rows,
    )[0]  # fmt: skip


def _seed(dropout: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, wanted at least 0 and less than 1")
    if isinstance(seed, Tensor):
        check_shape("dropout_seed", seed)
        check_dtype("dropout_seed", seed, torch.int64)
        check_device("dropout_seed", seed, device)
    if dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return reference.draw_seed(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _check_table(table: Tensor, q: Tensor) -> None:
    check_dims("table", table, "H T")
    if table.shape[0] != q.shape[1] or table.shape[1] == 0:
        raise ValueError(
            f"table has shape {tuple(table.shape)}, wanted ({q.shape[1]}, T) with T at least 1"
        )
    check_dtype("table", table, torch.promote_types(q.dtype, torch.float32), torch.float32)
    check_device("table", table, q.device)


def _check_codes(
    name: str,
    codes: Tensor | None,
    table: Tensor | None,
    B: int,
    length: int,
    device: torch.device,
) -> None:
    if codes is None:
        if table is not None:
            raise ValueError(f"{name} is None, wanted ({B} or 1, {length}) int32 with a table")
        return
    if table is None:
        raise ValueError(f"{name} is given without a table, wanted None")
    if codes.dim() != 2 or codes.shape[0] not in (1, B) or codes.shape[1] != length:
        raise ValueError(f"{name} has shape {tuple(codes.shape)}, wanted ({B} or 1, {length})")
    check_dtype(name, codes, torch.int32)
    check_device(name, codes, device)
