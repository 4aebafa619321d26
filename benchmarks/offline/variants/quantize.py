"""The launches of residual vector quantisation: encoding and decoding."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import (
    ASYNCHRONOUS_DOTS,
    SUMS_IN_ORDER,
    Promises,
    Variant,
    meta,
)
from musiclm_kernels.quantize.decode import rvq_decode
from musiclm_kernels.quantize.encode import rvq_encode


def encode(
    mode: str,
    *,
    N: int = 16000,
    D: int = 128,
    Q: int = 12,
    K: int = 1024,
    dtype: torch.dtype = torch.float32,
) -> Any:
    x, codebooks = meta(N, D, dtype=dtype), meta(Q, K, D, dtype=torch.float32)
    return rvq_encode(x, codebooks, mode)


def decode(dtype: torch.dtype, *, D: int = 128, Q: int = 12) -> Any:
    return rvq_decode(meta(16000, Q, dtype=torch.int64), meta(Q, 1024, D, dtype=dtype))


DOTS = Promises(tensor_cores=ASYNCHRONOUS_DOTS, no_float_atomics=True)

# One for each family of tiles, and what presses on the registers most.
ENCODE: dict[str, dict[str, Any]] = {
    "d16 q32": {"D": 16, "Q": 32},
    "d64": {"D": 64, "Q": 8},
    "d100 of 1000 codes": {"D": 100, "K": 1000},
    "d128": {},
    "d128 few rows": {"N": 4096},
    "d128 few rows q32": {"N": 4096, "Q": 32},
    "d128 bf16": {"dtype": torch.bfloat16},
    "d128 q32": {"Q": 32},
    "d256": {"D": 256},
    "d300 q32": {"D": 300, "Q": 32},
    "d512": {"D": 512},
}

VARIANTS = [
    Variant(f"rvq_encode {mode} {name}", partial(encode, mode, **case), DOTS)
    for mode in ("fast", "exact")
    for name, case in ENCODE.items()
] + [
    Variant("rvq_decode float32 d128", partial(decode, torch.float32), SUMS_IN_ORDER),
    Variant("rvq_decode bfloat16 d128 q32", partial(decode, torch.bfloat16, Q=32), SUMS_IN_ORDER),
    Variant("rvq_decode float32 d512", partial(decode, torch.float32, D=512), SUMS_IN_ORDER),
]
