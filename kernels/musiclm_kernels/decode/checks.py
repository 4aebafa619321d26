"""What both ops of the cache refuse of it."""

import torch
from torch import Tensor

from musiclm_kernels.checks import check_device, check_dtype, check_shape
from musiclm_kernels.decode.reference import FLOAT8


def check_caches(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    """Both caches [B, Hkv, S, D] are alike, in x's dtype, or in float8 with a scale each slot."""
    check_dtype("k_cache", k_cache, x.dtype, FLOAT8)
    check_shape("v_cache", v_cache, *k_cache.shape)
    check_dtype("v_cache", v_cache, k_cache.dtype)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(name, cache, x.device)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if k_cache.dtype != FLOAT8:
            if scales is not None:
                raise ValueError(f"{name} is given without float8 caches, wanted None")
            continue
        if scales is None:
            raise ValueError(
                f"{name} is None, wanted {tuple(k_cache.shape[:3])} float32 with float8 caches"
            )
        check_shape(name, scales, *k_cache.shape[:3])
        check_dtype(name, scales, torch.float32)
        check_device(name, scales, x.device)
