from musiclm_kernels.quantize.op import rvq_decode, rvq_ema_update, rvq_encode

__all__ = ["rvq_decode", "rvq_ema_update", "rvq_encode"]
