"""The launches of attention with a bias from a table."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import DOTS, SUMS_IN_ORDER, Variant, meta
from musiclm_kernels.attention.backward import attention_backward
from musiclm_kernels.attention.forward import attention_and_lse

B, H = 2, 8
ROWS, COLUMNS = 8, 62  # the patches of ten seconds


def attention(
    backward: bool,
    dtype: torch.dtype = torch.bfloat16,
    *,
    N: int = ROWS * COLUMNS,
    D: int = 64,
    num_key_heads: int = H,
    T: int | None = (2 * ROWS - 1) * (2 * COLUMNS - 1),
    per_row: bool = False,
    causal: bool = False,
    masked: bool = False,
    dropout: float = 0.0,
    bounded: bool = False,
) -> Any:
    """Launch the forward or the backward pass, with the table's gradient if there is a table."""
    # as projections leave them: [B, N, heads, D] in memory
    q, k, v = (
        meta(B, N, heads, D, dtype=dtype).transpose(1, 2)
        for heads in (H, num_key_heads, num_key_heads)
    )
    table = codes = None
    if T is not None:
        table = meta(H, T, dtype=torch.float32)
        codes = meta(B if per_row else 1, N, dtype=torch.int32)
    options = (
        table, codes, codes, 0, causal, meta(B, N, dtype=torch.bool) if masked else None, 0.125,
        dropout, meta((), dtype=torch.int64) if dropout else None,
        meta(H, dtype=torch.float32) if bounded else None, ROWS,
    )  # fmt: skip
    if not backward:
        return attention_and_lse(q, k, v, *options)
    lse = meta(B, H, N, dtype=torch.float32)
    return attention_backward(q, q, k, v, q, lse, *options, T is not None)


# One for each path through the kernels, and each family of tiles.
ATTENTION: dict[str, dict[str, Any]] = {
    "bf16 d64 grid": {},
    "bf16 d64 no table": {"T": None},
    "bf16 d64 patch dropout bounded": {"N": 372, "per_row": True, "bounded": True},
    "bf16 d64 line causal": {"N": 1024, "T": 2047, "causal": True},
    "bf16 d64 masked": {"per_row": True, "masked": True},
    "bf16 d64 dropout": {"dropout": 0.1, "causal": True},
    "bf16 d64 one key head": {"num_key_heads": 1, "N": 2048, "T": 4095, "causal": True},
    "bf16 d64 table of 16383": {"N": 8192, "T": 16383},
    "bf16 d64 table in memory": {"N": 8192, "T": 32767},
    "bf16 d32 grid": {"D": 32},
    "bf16 d80 grid": {"D": 80},
    "bf16 d128 line causal": {"D": 128, "N": 2048, "T": 4095, "causal": True},
    "fp16 d64 grid": {"dtype": torch.float16},
    "fp32 d64 grid": {"dtype": torch.float32},
    "fp32 d128 line causal": {"dtype": torch.float32, "D": 128, "T": 991, "causal": True},
}

VARIANTS = [
    Variant(
        f"attention {'backward' if backward else 'forward'} {name}",
        partial(attention, backward, **case),
        SUMS_IN_ORDER if case.get("dtype") == torch.float32 else DOTS,
    )
    for backward in (False, True)
    for name, case in ATTENTION.items()
]
