"""The launches we ship, a module each op and a line each launch."""

from benchmarks.offline.promises import Variant
from benchmarks.offline.variants import (
    attention,
    contrastive,
    patch_dropout,
    qk_l2norm,
    quantize,
    quantize_ema,
)

VARIANTS: list[Variant] = [
    *attention.VARIANTS,
    *qk_l2norm.VARIANTS,
    *quantize.VARIANTS,
    *quantize_ema.VARIANTS,
    *patch_dropout.VARIANTS,
    *contrastive.VARIANTS,
]
