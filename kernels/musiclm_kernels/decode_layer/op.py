"""The parts of a decode step's layer as PyTorch ops: schemas, shape rules, the public functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import (
    FLOATS,
    INTS,
    check_device,
    check_dims,
    check_dtype,
    check_shape,
)
from musiclm_kernels.decode_layer import plain
from musiclm_kernels.decode_layer.composition_reference import HyperConnection, output_dtype
from musiclm_kernels.registry import define_op, inlines_on_cpu, without_autocast

ACTIVATIONS = ("none", "gelu", "geglu")
MAX_HEAD = 256  # as wide as the heads that `decode_attention` reads
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


def _fake_mix(x: Tensor) -> Tensor:
    return x.new_empty(0) if x.dim() == 2 else x.new_empty(*x.shape[:2], x.shape[1] + 2)


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    connection_weight: Tensor | None,
    connection_scale: Tensor | None,
    connection_static: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    N = len(weight) // 2 if activation == "geglu" else len(weight)
    return x.new_empty(len(x), N, dtype=dtype), _fake_mix(x)


def _qkv(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v, mix = plain.decode_qkv(*arguments)
    return q.contiguous(), v.contiguous(), mix  # of one product, and an op's results share nothing


def _fake_qkv(
    x: Tensor, weight: Tensor, k_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    Hkv, d = k_cache.shape[1], k_cache.shape[3]
    dtype = rest[-1]
    q = x.new_empty(len(x), len(weight) // d - 2 * Hkv, d, dtype=dtype)
    return q, x.new_empty(len(x), Hkv, d, dtype=dtype), _fake_mix(x)


def _fake_residual(*_: Any) -> None:
    return None


_decode_linear = define_op(
    "decode_linear",
    "(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? norm_weight, Tensor? norm_bias, "
    "str activation, Tensor? connection_weight, Tensor? connection_scale, "
    "Tensor? connection_static, ScalarType dtype) -> (Tensor, Tensor)",
    plain.decode_linear,
    _fake_linear,
    kernel="musiclm_kernels.decode_layer.launch:decode_linear",
)
_decode_qkv = define_op(
    "decode_qkv",
    "(Tensor x, Tensor weight, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "Tensor? weight_scale, Tensor? norm_weight, Tensor? norm_bias, bool normalize_kv, "
    "Tensor? q_gain, Tensor? k_gain, Tensor? first_value, Tensor? connection_weight, "
    "Tensor? connection_scale, Tensor? connection_static, Tensor(c!)? k_scales, "
    "Tensor(d!)? v_scales, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _qkv,
    _fake_qkv,
    kernel="musiclm_kernels.decode_layer.launch:decode_qkv",
)
_decode_residual = define_op(
    "decode_residual",
    "(Tensor(a!) x, Tensor h, Tensor weight, Tensor? weight_scale, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? mix, bool mixed) -> ()",
    plain.decode_residual,
    _fake_residual,
    kernel="musiclm_kernels.decode_layer.launch:decode_residual",
)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "none",
    connection: HyperConnection | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token a row through a layer norm, a projection and an activation, in one launch:

        y[b] = activation((weight * weight_scale[:, None]) @ LayerNorm(input[b]))

    The input is x[b], or what the connection reads from the streams x[b]. "gelu" is by the error
    function; "geglu" takes weight's first half as values and its second as gates: value * gelu(gate).
    Not differentiable: the results carry no gradient.

    Up to 16 rows run a kernel that reads the weights once; more, or a width above 8,192, run
    PyTorch's own operations. A row's bits depend on no other row, within 1 to 4 rows and within 5 to
    16; beyond they may. On Hopper and later a kernel may start, and load what never changes, while the
    one before it runs: change weights in place only where something else lies in between.

    Args:
        x: [B, D], or [B, s, D] residual streams with a connection; float32 (or float64 with float64
            weights).
        weight: [N, D], any float dtype, int8 or float8_e4m3fn; rows may have gaps between them.
        weight_scale: [N] float32, beside weights of 8 bits and only there (see `quantize_weight`).
        norm_weight, norm_bias: [D] each, any float dtype; None for no layer norm, or no bias of one.
            Its epsilon is 1e-5. These, weight_scale and connection are contiguous.
        activation: "none", "gelu" or "geglu" (N is even).
        connection: how the streams are read, with streams and only then.
        dtype: of y; weight's if None, or x's beside weights of 8 bits.

    Returns:
        y [B, N], or [B, N / 2] with "geglu"; and the connection's mix [B, s, s + 2] in x's dtype for
        `decode_residual`, or None. Norms and sums run in fp32. On a GPU 5 rows and more round the
        product's input, normalised or not, to weight's type (bfloat16 beside weights of 8 bits), and
        so do fewer with streams of more than 4096 elements a row, with gains or with float8 caches:
        in float16 an input without a norm may overflow. On a CPU every row does beside bfloat16 and
        8 bits.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or an activation unknown.

    Source: pre-norm transformer (arXiv 2002.04745), GEGLU (arXiv 2002.05202, section 2);
    hyper-connections as `HyperConnection` says.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, wanted one of {', '.join(ACTIVATIONS)}")
    _check_input(x, connection)
    _check_weight(weight, weight_scale, x, x.shape[-1])
    if activation == "geglu" and len(weight) % 2:
        raise ValueError(f"weight has {len(weight)} rows, wanted an even number with geglu")
    _check_norm(norm_weight, norm_bias, x, x.shape[-1])
    dtype = _checked_output_dtype(dtype, x, weight)
    arguments = _detached(
        x, weight, weight_scale, norm_weight, norm_bias, activation,
        *(connection or (None, None, None)), dtype,
    )  # fmt: skip
    y, mix = _choose(x, plain.decode_linear, _decode_linear)(*arguments)
    return y, None if connection is None else mix


def decode_qkv(
    x: Tensor,
    weight: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    weight_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    normalize_kv: bool = True,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    first_value: Tensor | None = None,
    connection: HyperConnection | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and values of one token a row, the last two written into the cache, in one
    launch:

        q, k, v = split((weight * weight_scale[:, None]) @ LayerNorm(input[b]))
        q = q_gain * q / |q|,  k = k_gain * k / |k|                      with gains
        k_cache[b, :, positions[b] % S] = k
        v_cache[b, :, positions[b] % S] = v, or (v + first_value[b]) / 2 with first_value

    A row whose position is negative writes nothing. Everything else is as in `decode_linear`.

    Args:
        x: [B, D], or [B, s, D] with a connection; float32 (or float64 with float64 weights).
        weight: [(H + 2 Hkv) d, D]: the rows of the queries, then of the keys, then of the values.
        k_cache, v_cache: [B, Hkv, S, d], any float dtype or float8_e4m3fn; strided, written.
        positions: [B] int32 or int64.
        weight_scale, norm_weight, norm_bias, connection: as for `decode_linear`.
        normalize_kv: if False, keys and values are projections of the input without the layer norm.
        q_gain: [d] or [H, d], any float dtype: with it queries are made of length 1 (1e-12 at least
            is divided by) and multiplied by it.
        k_gain: [d] or [Hkv, d], the same for keys.
        first_value: [B, Hkv, d], any float dtype: the values of this token in the first layer.
        k_scales, v_scales: [B, Hkv, S] float32, beside float8 caches and only there; written: of
            each slot and head, the largest magnitude / 448 (1 if that is no normal number).
        dtype: of q and v; weight's if None, or x's beside weights of 8 bits.

    Returns:
        q [B, H, d]; v [B, Hkv, d], this token's own, not averaged; and the mix or None.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.

    Source: value residual learning (arXiv 2410.17897, section 3); unit queries and keys as
    `qk_l2norm`.
    """
    _check_input(x, connection)
    B, D = len(x), x.shape[-1]
    check_dims("k_cache", k_cache, "B Hkv S d")
    _, Hkv, S, d = k_cache.shape
    float8 = k_cache.dtype == torch.float8_e4m3fn
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, B, Hkv, S, d)
        check_dtype(name, cache, *((k_cache.dtype,) if float8 else FLOATS))
        check_device(name, cache, x.device)
        if cache.stride(3) != 1 and d > 1:
            raise ValueError(f"{name} has strides {cache.stride()}, wanted 1 at last")
        if S == 0 and B:
            raise ValueError(f"{name} has shape {tuple(cache.shape)}, wanted a slot")
    check_dtype("k_cache", k_cache, torch.float8_e4m3fn, v_cache.dtype)
    _check_weight(weight, weight_scale, x, D)
    if d > MAX_HEAD:
        raise ValueError(f"k_cache has width {d}, wanted at most {MAX_HEAD}")
    if d == 0 or len(weight) % d or len(weight) <= 2 * Hkv * d:
        raise ValueError(
            f"weight has {len(weight)} rows, wanted (H + {2 * Hkv}) * {d} for a number of heads H"
        )
    H = len(weight) // d - 2 * Hkv
    check_shape("positions", positions, B)
    check_dtype("positions", positions, *INTS)
    check_device("positions", positions, x.device)
    _check_norm(norm_weight, norm_bias, x, D)
    for name, gain, heads in (("q_gain", q_gain, H), ("k_gain", k_gain, Hkv)):
        if gain is not None:
            if gain.shape not in ((d,), (heads, d)):
                raise ValueError(
                    f"{name} has shape {tuple(gain.shape)}, wanted {(d,)} or {(heads, d)}"
                )
            _check_float(name, gain, x)
    if first_value is not None:
        check_shape("first_value", first_value, B, Hkv, d)
        _check_float("first_value", first_value, x)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (scales is not None) != float8:
            raise ValueError(
                f"{name} is {'given' if scales is not None else 'None'} beside caches of "
                f"{k_cache.dtype}, wanted with torch.float8_e4m3fn and only then"
            )
        if scales is not None:
            check_shape(name, scales, B, Hkv, S)
            check_dtype(name, scales, torch.float32)
            check_device(name, scales, x.device)
    if k_scales is not None and v_scales is not None and _steps(k_scales) != _steps(v_scales):
        raise ValueError(
            f"v_scales has strides {v_scales.stride()}, wanted those of k_scales, {k_scales.stride()}"
        )
    dtype = _checked_output_dtype(dtype, x, weight)
    arguments = _detached(
        x, weight, k_cache, v_cache, positions, weight_scale, norm_weight, norm_bias,
        normalize_kv, q_gain, k_gain, first_value,
        *(connection or (None, None, None)), k_scales, v_scales, dtype,
    )  # fmt: skip
    q, v, mix = _choose(x, plain.decode_qkv, _decode_qkv)(*arguments)
    return q, v, None if connection is None else mix


def decode_residual(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mix: Tensor | None = None,
    mixed: bool = True,
) -> None:
    """A projection of one token a row added to the residual, in place, in one launch:

        y[b] = (weight * weight_scale[:, None]) @ LayerNorm(h[b])
        x[b] = x[b] + y[b]                                                       without a mix
        x[b, j] = (sum_i mix[b, i, 1 + j] x[b, i], or x[b, j]) + mix[b, j, s + 1] y[b]

    Rows, precision and bits are as in `decode_linear`.

    Args:
        x: [B, D], or [B, s, D] with a mix; float32 (or float64 with float64 weights); contiguous,
            written.
        h: [B, K], any float dtype.
        weight: [D, K]; weight_scale: [D]; as for `decode_linear`.
        norm_weight, norm_bias: [K] each, any float dtype; None for no layer norm, or no bias of one.
        mix: [B, s, s + 2], x's dtype, as `decode_linear` and `decode_qkv` return it.
        mixed: whether the streams are mixed, or kept, before y is added.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.

    Source: as `decode_linear`.
    """
    _check_streams(x, mix is not None, "mix")
    _check_packed("x", x)  # written in place
    check_dims("h", h, "B K")
    check_shape("h", h, len(x), h.shape[1])
    _check_float("h", h, x)
    K = h.shape[1]
    _check_weight(weight, weight_scale, x, K)
    check_shape("weight", weight, x.shape[-1], K)
    _check_norm(norm_weight, norm_bias, x, K)
    if mix is not None:
        check_shape("mix", mix, *x.shape[:2], x.shape[1] + 2)
        check_dtype("mix", mix, x.dtype)
        check_device("mix", mix, x.device)
    arguments = _detached(x, h, weight, weight_scale, norm_weight, norm_bias, mix, mixed)
    _choose(x, plain.decode_residual, _decode_residual)(*arguments)


def _steps(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _choose(x: Tensor, body: Callable[..., Any], op: Callable[..., Any]) -> Callable[..., Any]:
    return without_autocast(body) if inlines_on_cpu(x) else op


def _check_streams(x: Tensor, with_streams: bool, companion: str) -> None:
    if x.dim() != 2 + with_streams:
        layout = (
            f"(B, s, D) with a {companion}" if with_streams else f"(B, D) without a {companion}"
        )
        raise ValueError(f"x has shape {tuple(x.shape)}, wanted {layout}")
    check_dtype("x", x, torch.float32, torch.float64)


def _check_input(x: Tensor, connection: HyperConnection | None) -> None:
    _check_streams(x, connection is not None, "connection")
    if connection is None:
        return
    _, s, D = x.shape
    shapes = {"weight": (s + 2, D), "scale": (s + 2,), "static": (s, s + 2)}
    for field, shape in shapes.items():
        part = getattr(connection, field)
        check_shape(f"connection.{field}", part, *shape)
        check_dtype(f"connection.{field}", part, torch.float32, x.dtype)
        check_device(f"connection.{field}", part, x.device)
        _check_packed(f"connection.{field}", part)


def _check_packed(name: str, tensor: Tensor) -> None:
    """A kernel reads what never changes before it may wait for a copy of it."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, wanted a contiguous tensor")


def _check_float(name: str, tensor: Tensor, x: Tensor) -> None:
    check_dtype(name, tensor, *(FLOATS if x.dtype == torch.float64 else FLOATS[:3]))
    check_device(name, tensor, x.device)


def _check_weight(weight: Tensor, weight_scale: Tensor | None, x: Tensor, K: int) -> None:
    check_dims("weight", weight, "N K")
    check_shape("weight", weight, len(weight), K)
    if len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, wanted a row at least")
    check_dtype(
        "weight", weight, *(FLOATS if x.dtype == torch.float64 else FLOATS[:3]), *EIGHT_BITS
    )
    check_device("weight", weight, x.device)
    if weight.stride(1) != 1 and K > 1:
        raise ValueError(f"weight has strides {weight.stride()}, wanted rows without gaps inside")
    if (weight_scale is not None) != (weight.dtype in EIGHT_BITS):
        raise ValueError(
            f"weight_scale is {'given' if weight_scale is not None else 'None'} beside "
            f"{weight.dtype}, wanted with torch.int8 and torch.float8_e4m3fn and only then"
        )
    if weight_scale is not None:
        check_shape("weight_scale", weight_scale, len(weight))
        check_dtype("weight_scale", weight_scale, torch.float32)
        check_device("weight_scale", weight_scale, x.device)
        _check_packed("weight_scale", weight_scale)


def _check_norm(weight: Tensor | None, bias: Tensor | None, x: Tensor, K: int) -> None:
    if weight is None and bias is not None:
        raise ValueError("norm_bias is given without norm_weight, wanted None")
    for name, part in (("norm_weight", weight), ("norm_bias", bias)):
        if part is not None:
            check_shape(name, part, K)
            _check_float(name, part, x)
            _check_packed(name, part)


def _checked_output_dtype(dtype: torch.dtype | None, x: Tensor, weight: Tensor) -> torch.dtype:
    dtype = dtype or output_dtype(x, weight)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, wanted {' or '.join(map(str, FLOATS))}")
    return dtype


def _detached(*arguments: Any) -> list[Any]:
    """Left alone where there is nothing to detach: of a step on a CPU it costs its share."""
    return [a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in arguments]
