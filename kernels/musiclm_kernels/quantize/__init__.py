from musiclm_kernels.quantize.ema import (
    rvq_apply_statistics,
    rvq_ema_update,
    rvq_replacements,
    rvq_statistics,
)
from musiclm_kernels.quantize.op import rvq_decode, rvq_encode

__all__ = [
    "rvq_apply_statistics",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "rvq_replacements",
    "rvq_statistics",
]
