"""The launches of patch dropout and of the audio tower's front end."""

from functools import partial
from typing import Any

import torch

from benchmarks.offline.promises import ASYNCHRONOUS_DOTS, SUMS_IN_ORDER, Promises, Variant, meta
from musiclm_kernels.patch_dropout.backward import tokens_backward
from musiclm_kernels.patch_dropout.forward import tokens_and_places
from musiclm_kernels.patch_dropout.kernel import drop_patches, take_patches

ROWS, COLUMNS = 8, 62  # the patches of ten seconds
N, KEPT = ROWS * COLUMNS, 372


def drop(backward: bool, dtype: torch.dtype, B: int = 128, D: int = 768) -> Any:
    slots = meta(B, N, dtype=torch.int32)
    indices = meta(B, KEPT, dtype=torch.int64)
    if backward:
        return take_patches(meta(B, KEPT, D, dtype=dtype), slots, indices)
    return drop_patches(meta(B, N, D, dtype=dtype), KEPT, meta((), dtype=torch.int64))


def embed(
    backward: bool,
    dtype: torch.dtype = torch.bfloat16,
    *,
    B: int = 128,
    D: int = 768,
    P: int = 16,
    keep: int = KEPT,
    padded: bool = False,
) -> Any:
    """On a float32 spectrogram, with float32 parameters: as in training under autocast."""
    spectrogram = meta(B, COLUMNS * P, ROWS * P, dtype=torch.float32)
    sizes = ((P * P,), (P * P,), (D, P * P), (D,), (D,), (D,))
    parameters = [meta(size, dtype=torch.float32) for size in sizes]
    if not backward:
        num_valid = meta(B, dtype=torch.int64) if padded else None
        seed = meta((), dtype=torch.int64) if keep < N else None
        return tokens_and_places(spectrogram, num_valid, seed, keep, P, *parameters, dtype)
    return tokens_backward(
        meta(B, keep, D, dtype=dtype), spectrogram, meta(B, keep, dtype=torch.int64),
        meta(B, keep, dtype=torch.bool), meta(B, N, dtype=torch.int32), P, *parameters, True,
    )  # fmt: skip


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "bf16 d768": {},
    "bf16 d512 B32": {"D": 512, "B": 32},
    "bf16 d1024 padded": {"D": 1024, "padded": True},
    "bf16 d192 all": {"D": 192, "keep": N},
    "bf16 d768 patches of 8": {"P": 8},
    "bf16 d768 patches of 12": {"P": 12},
    "bf16 d768 patches of 32": {"P": 32},
    "fp16 d768": {"dtype": torch.float16},
    "fp32 d768": {"dtype": torch.float32},
}
DOTS = Promises(tensor_cores=ASYNCHRONOUS_DOTS, no_float_atomics=True)
MULTIPLIED_BY_PYTORCH = ("fp32 d768", "bf16 d768 patches of 32")

VARIANTS = [
    *(
        Variant(
            f"drop_patches {'backward' if backward else 'forward'} {str(dtype)[6:]} d768",
            partial(drop, backward, dtype),
            SUMS_IN_ORDER,
        )
        for backward in (False, True)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    *(
        Variant(
            f"embed_patches {'backward' if backward else 'forward'} {name}",
            partial(embed, backward, **case),
            SUMS_IN_ORDER if backward or name in MULTIPLIED_BY_PYTORCH else DOTS,
        )
        for backward in (False, True)
        for name, case in EMBEDDINGS.items()
    ),
]
