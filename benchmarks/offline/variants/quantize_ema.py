"""The launches of the training of residual codebooks."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import SUMS_IN_ORDER, Variant, meta
from musiclm_kernels.quantize.ema_averages import rvq_ema_update


def ema(
    dtype: torch.dtype = torch.float32, *, N: int = 16384, Q: int = 12, K: int = 1024, D: int = 128
) -> Any:
    """Launch the three steps of one update."""
    books, sizes = meta(Q, K, D, dtype=torch.float32), meta(Q, K, dtype=torch.float32)
    x, codes = meta(N, D, dtype=dtype), meta(N, Q, dtype=torch.int64)
    return rvq_ema_update(
        books, sizes, books, x, codes, meta((), dtype=torch.int64), 0.99, 1.6, 1e-5
    )


# Each family of tiles: MuLaN and SoundStream, DAC, wide features, a width that is no power of two.
EMA: dict[str, dict[str, Any]] = {
    "fp32 d128": {},
    "bf16 d128": {"dtype": torch.bfloat16},
    "fp32 d8 32 levels": {"D": 8, "Q": 32},
    "fp32 d512 16384 codes": {"D": 512, "Q": 1, "K": 16384},
    "fp32 d100": {"D": 100},
}

VARIANTS = [
    Variant(f"rvq_ema_update {name}", partial(ema, **case), SUMS_IN_ORDER)
    for name, case in EMA.items()
]
