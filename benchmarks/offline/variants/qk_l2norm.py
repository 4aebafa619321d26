"""The launches of unit queries and keys."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.offline.promises import SUMS_IN_ORDER, Variant, meta
from musiclm_kernels.qk_l2norm.kernel import qk_l2norm, qk_l2norm_backward

B, N, H = 2, 496, 8  # the patches of ten seconds


def norms(backward: bool, dtype: torch.dtype, D: int) -> Any:
    """Launch on queries and keys as a projection leaves them."""
    x: Tensor = meta(B, N, H, D, dtype=dtype).transpose(1, 2)
    scale = meta(D, dtype=torch.float32)
    if backward:
        return qk_l2norm_backward(x, x, x, x, scale, scale)
    return qk_l2norm(x, x, scale, scale)


NORMS = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)]

VARIANTS = [
    Variant(
        f"qk_l2norm {'backward' if backward else 'forward'} {str(dtype)[6:]} d{D}",
        partial(norms, backward, dtype, D),
        SUMS_IN_ORDER,
    )
    for backward in (False, True)
    for dtype, D in NORMS
]
