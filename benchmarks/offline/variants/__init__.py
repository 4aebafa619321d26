"""The launches we ship, a module each op and a line each launch."""

from benchmarks.offline.promises import Variant
from benchmarks.offline.variants import (
    attention,
    contrastive,
    decode,
    decode_layer,
    patch_dropout,
    qk_l2norm,
    quantize,
    quantize_ema,
    sampling,
)

VARIANTS: list[Variant] = [
    *attention.VARIANTS,
    *qk_l2norm.VARIANTS,
    *quantize.VARIANTS,
    *quantize_ema.VARIANTS,
    *patch_dropout.VARIANTS,
    *contrastive.VARIANTS,
    *decode.VARIANTS,
    *decode_layer.VARIANTS,
    *sampling.VARIANTS,
]
