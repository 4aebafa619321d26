"""Writing into the cache as a PyTorch op: schema, shape rule, and the public function."""

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
from musiclm_kernels.decode import reference
from musiclm_kernels.decode.checks import check_caches
from musiclm_kernels.registry import define_op, inlines_on_cpu, without_autocast


def _reference(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    reference.append_to_cache(
        k_cache, v_cache, k, v, positions, k_scales=k_scales, v_scales=v_scales
    )


def _fake(*_: Any) -> None:
    return None


_append_to_cache = define_op(
    "append_to_cache",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor positions, "
    "Tensor(c!)? k_scales, Tensor(d!)? v_scales) -> ()",
    _reference,
    _fake,
    kernel="musiclm_kernels.decode.append:append_to_cache",
)


def append_to_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Write N new tokens of each row into its cache, in place:

        k_cache[b, :, (positions[b] + n) % S] = k[b, :, n], and the same for v

    A cache of S slots is a ring once positions pass S: the newest S tokens stay, and attention over
    min(position + N, S) slots sees them, in whatever order they stand. A row whose position is
    negative writes nothing. Into float8 caches goes x / s rounded to nearest, and into the scales
    s = amax|x| / 448 of that token and head; 1 where that would be below the smallest normal
    number, as for a token of zeros. Not differentiable.

    Args:
        k_cache: [B, Hkv, S, D], k's dtype or float8_e4m3fn. Written through its strides; on CUDA
            the last one is 1.
        v_cache: [B, Hkv, S, D], as k_cache.
        k: [B, Hkv, N, D], any float dtype; float64 not into float8. N at most S.
        v: [B, Hkv, N, D], k's dtype.
        positions: [B] int32 or int64, of each row's first new token, from 0 up; or negative.
        k_scales: [B, Hkv, S] float32; needed with float8 caches and only then.
        v_scales: [B, Hkv, S] float32, the same for values.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above; on CUDA, D above 256, a
            cache whose last stride is not 1, or float8 on a GPU older than compute capability 8.9.

    Source: this project; a scale for each token and head as in KIVI's values (arXiv 2402.02750).
    """
    check_dims("k", k, "B Hkv N D")
    check_dtype("k", k, *FLOATS)
    B, num_key_heads, N, D = k.shape
    check_shape("v", v, *k.shape)
    check_dtype("v", v, k.dtype)
    check_device("v", v, k.device)
    check_dims("k_cache", k_cache, "B Hkv S D")
    check_shape("k_cache", k_cache, B, num_key_heads, k_cache.shape[2], D)
    check_caches(k, k_cache, v_cache, k_scales, v_scales)
    if k.dtype == torch.float64:
        check_dtype("k_cache", k_cache, k.dtype)
    if N > k_cache.shape[2]:
        raise ValueError(f"k has {N} tokens, wanted at most the cache's {k_cache.shape[2]} slots")
    check_shape("positions", positions, B)
    check_dtype("positions", positions, *INTS)
    check_device("positions", positions, k.device)
    body = without_autocast(_reference) if inlines_on_cpu(k) else _append_to_cache
    body(k_cache, v_cache, k.detach(), v.detach(), positions, k_scales, v_scales)
