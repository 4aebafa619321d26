"""Every op as its definition: plain PyTorch under the public names, float64 where inputs are."""

from musiclm_kernels.attention.reference import biased_attention
from musiclm_kernels.contrastive.reference import contrastive_loss
from musiclm_kernels.decode.reference import decode_attention
from musiclm_kernels.patch_dropout.reference import drop_patches
from musiclm_kernels.qk_l2norm.reference import qk_l2norm
from musiclm_kernels.quantize.reference import rvq_decode, rvq_ema_update, rvq_encode
from musiclm_kernels.sampling.reference import sample_logits

__all__ = [
    "biased_attention",
    "contrastive_loss",
    "decode_attention",
    "drop_patches",
    "qk_l2norm",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "sample_logits",
]
