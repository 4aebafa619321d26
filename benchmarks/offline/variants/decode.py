"""The launches of attention over a cache, and of writing into it."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import (
    ARCHITECTURES,
    ASYNCHRONOUS_DOTS,
    SUMS_IN_ORDER,
    Promises,
    Variant,
    meta,
)
from musiclm_kernels.decode.append import append_to_cache
from musiclm_kernels.decode.launch import decode_attention

B, S = 4, 1024
FLOAT8 = torch.float8_e4m3fn


def attention(
    dtype: torch.dtype = torch.bfloat16,
    *,
    H: int = 16,
    num_key_heads: int = 16,
    D: int = 64,
    slots: int = S,
    cache: torch.dtype | None = None,
    biased: bool = True,
    per_row: bool = False,
    masked: bool = False,
    null: bool = False,
) -> Any:
    """Launch over one layer of a cache of several."""
    cache = cache or dtype
    keys, values = (meta(12, B, num_key_heads, slots, D, dtype=cache)[3] for _ in range(2))
    scales = None
    if cache == FLOAT8:
        scales = meta(B, num_key_heads, slots, dtype=torch.float32)
    return decode_attention(
        meta(B, H, D, dtype=dtype), keys, values, meta(B, dtype=torch.int32),
        meta(H, 2 * slots, dtype=torch.float32) if biased else None,
        meta(B, dtype=torch.int32) if biased else None,
        meta(B if per_row else 1, slots, dtype=torch.int32) if biased else None,
        0, 0.125, meta(B, slots, dtype=torch.bool) if masked else None,
        meta(2, num_key_heads, D, dtype=dtype) if null else None,
        scales, scales, None, meta(B * H, dtype=torch.int32),
    )  # fmt: skip


def appending(
    dtype: torch.dtype = torch.bfloat16,
    *,
    N: int = 1,
    num_key_heads: int = 16,
    D: int = 64,
    cache: torch.dtype | None = None,
) -> Any:
    """Write into one layer of a cache of several what a fused projection left."""
    cache = cache or dtype
    keys, values = (meta(12, B, num_key_heads, S, D, dtype=cache)[3] for _ in range(2))
    k, v = meta(B, N, 3, num_key_heads, D, dtype=dtype).transpose(1, 3).unbind(2)[1:]
    scales = None
    if cache == FLOAT8:
        scales = meta(B, num_key_heads, S, dtype=torch.float32)
    return append_to_cache(keys, values, k, v, meta(B, dtype=torch.int32), scales, scales)


ATTENTION: dict[str, dict[str, Any]] = {
    "bf16 d64": {},
    "bf16 d64 no table": {"biased": False},
    "bf16 d64 masked null": {"masked": True, "null": True, "per_row": True},
    "bf16 d64 16k": {"slots": 16384},
    "bf16 d64 one key head": {"num_key_heads": 1, "H": 8},
    "bf16 d64 one key head masked null": {
        "num_key_heads": 1, "H": 8, "masked": True, "null": True, "per_row": True,
    },
    "bf16 d64 one key head 16k": {"num_key_heads": 1, "slots": 16384},
    "bf16 d64 groups of 4": {"num_key_heads": 4},
    "bf16 d32": {"D": 32},
    "bf16 d32 one key head": {"D": 32, "num_key_heads": 1, "H": 8},
    "bf16 d80": {"D": 80},
    "bf16 d128": {"D": 128, "H": 8, "num_key_heads": 8},
    "bf16 d128 groups of 4": {"D": 128, "H": 32, "num_key_heads": 8},
    "bf16 d256": {"D": 256, "H": 8, "num_key_heads": 8},
    "bf16 d256 groups of 4": {"D": 256, "H": 8, "num_key_heads": 2},
    "fp16 d64": {"dtype": torch.float16},
    "fp32 d64": {"dtype": torch.float32},
    "fp32 d64 one key head": {"dtype": torch.float32, "num_key_heads": 1, "H": 8},
    "fp32 d128": {"dtype": torch.float32, "D": 128, "H": 8, "num_key_heads": 8},
    "fp32 d256": {"dtype": torch.float32, "D": 256, "H": 8, "num_key_heads": 8},
    "float8 d64": {"cache": FLOAT8},
    "float8 d128": {"cache": FLOAT8, "D": 128, "H": 8, "num_key_heads": 8},
    "float8 d256": {"cache": FLOAT8, "D": 256, "H": 8, "num_key_heads": 8},
    "float8 d256 groups of 4": {"cache": FLOAT8, "D": 256, "H": 8, "num_key_heads": 2},
    "float8 d64 one key head": {"cache": FLOAT8, "num_key_heads": 1, "H": 8},
    "float8 d128 groups of 4": {"cache": FLOAT8, "D": 128, "H": 32, "num_key_heads": 8},
}  # fmt: skip

APPENDING: dict[str, dict[str, Any]] = {
    "bf16 d64 one token": {},
    "bf16 d64 many tokens": {"N": 512},
    "fp32 d256 many tokens": {"dtype": torch.float32, "D": 256, "num_key_heads": 4, "N": 512},
    "float8 d64 one token": {"cache": FLOAT8},
    "float8 d128 many tokens": {"cache": FLOAT8, "D": 128, "N": 512},
}

DOTS = Promises(tensor_cores=ASYNCHRONOUS_DOTS, no_float_atomics=True)


def _promises(case: dict[str, Any]) -> Promises:
    grouped = case.get("num_key_heads", 16) < case.get("H", 16)
    return DOTS if grouped and case.get("dtype") != torch.float32 else SUMS_IN_ORDER


def _archs(case: dict[str, Any]) -> tuple[int, ...]:
    return (90, 100) if case.get("cache") == FLOAT8 else ARCHITECTURES


VARIANTS = [
    *(
        Variant(
            f"decode attention {name}", partial(attention, **case), _promises(case), _archs(case)
        )
        for name, case in ATTENTION.items()
    ),
    *(
        Variant(f"append {name}", partial(appending, **case), SUMS_IN_ORDER, _archs(case))
        for name, case in APPENDING.items()
    ),
]
