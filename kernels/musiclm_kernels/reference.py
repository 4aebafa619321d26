"""Every op as its definition: plain PyTorch under the public names, float64 where inputs are."""

from musiclm_kernels.attention.reference import biased_attention
from musiclm_kernels.contrastive.reference import (
    contrastive_gradient,
    contrastive_loss,
    contrastive_statistics,
)
from musiclm_kernels.decode.reference import append_to_cache, decode_attention
from musiclm_kernels.decode_layer.reference import decode_linear, decode_qkv, decode_residual
from musiclm_kernels.patch_dropout.reference import drop_patches, embed_patches
from musiclm_kernels.qk_l2norm.reference import qk_l2norm
from musiclm_kernels.quantize.ema_reference import (
    rvq_apply_statistics,
    rvq_ema_update,
    rvq_replacements,
    rvq_statistics,
)
from musiclm_kernels.quantize.reference import rvq_decode, rvq_encode
from musiclm_kernels.sampling.next_token_reference import sample_next_token
from musiclm_kernels.sampling.reference import sample_logits

__all__ = [
    "append_to_cache",
    "biased_attention",
    "contrastive_gradient",
    "contrastive_loss",
    "contrastive_statistics",
    "decode_attention",
    "decode_linear",
    "decode_qkv",
    "decode_residual",
    "drop_patches",
    "embed_patches",
    "qk_l2norm",
    "rvq_apply_statistics",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "rvq_replacements",
    "rvq_statistics",
    "sample_logits",
    "sample_next_token",
]
