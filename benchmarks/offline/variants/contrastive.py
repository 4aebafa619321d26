"""The launches of the contrastive losses."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import DOTS, SUMS_IN_ORDER, Variant, meta
from musiclm_kernels.contrastive.kernel import contrastive_gradient, contrastive_statistics

B = 8192


def contrastive(
    gradient: bool,
    kind: str,
    dtype: torch.dtype,
    D: int,
    *,
    L: int = 1,
    B: int = B,
    count: int | None = None,
) -> Any:
    """Launch the statistics or the gradient; `count` own pairs of B, or all."""
    rows = meta(L, B, D, dtype=dtype)
    scale = meta(L, dtype=torch.float32)
    bias = scale if kind == "sigmoid" else None
    log_sums = meta(0 if kind == "sigmoid" else 4, L, B, dtype=torch.float32)
    of_own = (kind, 0, B if count is None else count)
    if gradient:
        return contrastive_gradient(scale, rows, rows, log_sums, scale, bias, *of_own)
    return contrastive_statistics(rows, rows, scale, bias, *of_own)


# Each kind, type and family of tiles.
CASES: dict[str, tuple[Any, ...]] = {
    f"{kind} {str(dtype)[6:]} d{D}{note}": (kind, dtype, D, options)
    for kind, dtype, D, note, options in (
        ("softmax", torch.bfloat16, 128, "", {}),
        ("softmax", torch.bfloat16, 128, " few pairs", {"B": 1024}),
        ("softmax", torch.bfloat16, 128, " of 8 processes", {"count": B // 8}),
        ("softmax", torch.bfloat16, 128, " odd", {"B": 8191, "L": 3}),
        ("decoupled", torch.bfloat16, 128, "", {}),
        ("sigmoid", torch.bfloat16, 128, "", {}),
        ("sigmoid", torch.bfloat16, 128, " odd", {"B": 8191}),
        ("softmax", torch.bfloat16, 64, "", {}),
        ("softmax", torch.bfloat16, 200, "", {}),
        ("softmax", torch.bfloat16, 256, "", {}),
        ("softmax", torch.bfloat16, 512, "", {}),
        ("sigmoid", torch.bfloat16, 512, "", {}),
        ("decoupled", torch.bfloat16, 768, " odd", {"B": 8191}),
        ("softmax", torch.bfloat16, 1024, "", {}),
        ("decoupled", torch.float16, 128, "", {}),
        ("softmax", torch.float32, 128, "", {}),
        ("sigmoid", torch.float32, 128, " odd", {"B": 8191}),
        ("decoupled", torch.float32, 512, " odd", {"B": 8191}),
    )
}

VARIANTS = [
    Variant(
        f"contrastive {'gradient' if gradient else 'statistics'} {name}",
        partial(contrastive, gradient, kind, dtype, D, **options),
        SUMS_IN_ORDER if dtype == torch.float32 else DOTS,
    )
    for gradient in (False, True)
    for name, (kind, dtype, D, options) in CASES.items()
]
