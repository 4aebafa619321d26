"""The launches of sampling."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import ARCHITECTURES, Promises, Variant, meta
from musiclm_kernels.sampling.kernel import sample_logits
from musiclm_kernels.sampling.next_token import sample_next_token

B = 16
Filters = dict[str, Any]
UNFILTERED: Filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
ALL_FILTERS: Filters = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02}


def logits(V: int, dtype: torch.dtype, filters: Filters, guided: bool) -> Any:
    rows = meta(B, V, dtype=dtype)
    seeds, step = meta(B, dtype=torch.int64), meta((), dtype=torch.int64)
    allowed = meta(V, dtype=torch.bool) if guided else None
    guidance = (3.0, rows) if guided else (None, None)
    arguments: Any = (rows, *filters.values(), *guidance, seeds, 0, step, allowed)
    return sample_logits(*arguments)


def next_token(
    V: int,
    D: int,
    dtype: torch.dtype,
    filters: Filters,
    *,
    B: int = 1,
    L: int = 1,
    guided: bool = True,
    streams: int | None = None,
) -> Any:
    """Launch on rows and their twins, or on rows alone; with an end of sequence if guided."""
    R = 2 * B if guided else B
    x = meta(R, D) if streams is None else meta(R, streams, D)
    norm = meta(D), meta(D)
    scale = meta(L, V) if dtype.itemsize == 1 else None
    seeds, step = meta(B, dtype=torch.int64), meta((), dtype=torch.int64)
    ends = (V - 1, 10, meta(B, dtype=torch.bool)) if guided else (None, 0, None)
    arguments: Any = (
        x, *norm, meta(L, V, D, dtype=dtype), meta(L, V, D), scale, None, step, seeds,
        *filters.values(), 3.0 if guided else None, None, *ends, meta(1, dtype=torch.int32),
    )  # fmt: skip
    return sample_next_token(*arguments)


LOGITS = {
    f"sampling logits V{V} {str(dtype)[6:]} {name}": partial(logits, V, dtype, filters, guided)
    for V, dtype, name, filters, guided in (
        (1024, torch.float32, "unfiltered", UNFILTERED, False),
        (1024, torch.float32, "top_k, guided", UNFILTERED | {"top_k": 50}, True),
        (1024, torch.float32, "all filters, guided", ALL_FILTERS, True),
        (1025, torch.bfloat16, "all filters, guided", ALL_FILTERS, True),
        (1024, torch.float32, "greedy", UNFILTERED | {"temperature": 0.0}, False),
        (4096, torch.bfloat16, "all filters, guided", ALL_FILTERS, True),
        (8192, torch.float16, "all filters, guided", ALL_FILTERS, True),
        (16384, torch.bfloat16, "all filters, guided", ALL_FILTERS, True),
    )
}
NEXT_TOKEN = {
    f"sampling next token V{V} d{D} {str(dtype)[6:]} {name}": (
        partial(next_token, V, D, dtype, filters, **options),
        (90, 100) if dtype == torch.float8_e4m3fn else ARCHITECTURES,  # Ampere has no such type
    )
    for V, D, dtype, name, filters, options in (
        (1024, 1024, torch.bfloat16, "unfiltered", UNFILTERED, {}),
        (1024, 1024, torch.bfloat16, "all filters", ALL_FILTERS, {}),
        (1024, 1024, torch.bfloat16, "all filters, 2 rows", ALL_FILTERS, {"B": 2}),
        (1024, 1024, torch.bfloat16, "all filters, 16 rows", ALL_FILTERS, {"B": 16}),
        (1025, 1024, torch.bfloat16, "all filters", ALL_FILTERS, {}),
        (1024, 1024, torch.bfloat16, "all filters, 12 levels", ALL_FILTERS, {"L": 12}),
        (1024, 1024, torch.float16, "4 streams", UNFILTERED, {"streams": 4, "L": 4}),
        (1024, 1024, torch.int8, "all filters", ALL_FILTERS, {}),
        (1024, 1024, torch.float8_e4m3fn, "all filters", ALL_FILTERS, {}),
        (1024, 1024, torch.float32, "unguided", ALL_FILTERS, {"guided": False}),
        (1024, 768, torch.bfloat16, "unguided", UNFILTERED, {"guided": False}),
        (1024, 384, torch.float32, "all filters", ALL_FILTERS, {}),
        (4096, 1024, torch.bfloat16, "all filters", ALL_FILTERS, {}),
        (8192, 4096, torch.bfloat16, "all filters", ALL_FILTERS, {}),
    )
}

EXACT = Promises(no_float_atomics=True, no_fused_adds=True)
PREFETCHING = replace(EXACT, prefetches=True)
# The widest row leaves some words on the stack: 8 with Triton 3.6.0, up to 68 with 3.7.1.
WIDEST = replace(EXACT, max_spill_bytes=272)
VARIANTS = [
    *(
        Variant(name, launch, WIDEST if " V16384 " in name else EXACT)
        for name, launch in LOGITS.items()
    ),
    *(Variant(name, launch, PREFETCHING, archs) for name, (launch, archs) in NEXT_TOKEN.items()),
]
