"""MusicLM's operations as PyTorch ops, under `torch.ops.musiclm`.

Each op's body is its definition in plain PyTorch, on CPU and on CUDA; a Triton kernel can take its
place on CUDA. `implementations()` says what runs where.
"""

from musiclm_kernels import reference
from musiclm_kernels.attention import biased_attention
from musiclm_kernels.contrastive import (
    contrastive_gradient,
    contrastive_loss,
    contrastive_statistics,
)
from musiclm_kernels.decode import append_to_cache, decode_attention
from musiclm_kernels.decode_layer import (
    HyperConnection,
    decode_linear,
    decode_qkv,
    decode_residual,
    quantize_weight,
)
from musiclm_kernels.patch_dropout import drop_patches, embed_patches
from musiclm_kernels.philox import random_words
from musiclm_kernels.qk_l2norm import qk_l2norm
from musiclm_kernels.quantize import (
    rvq_apply_statistics,
    rvq_decode,
    rvq_ema_update,
    rvq_encode,
    rvq_replacements,
    rvq_statistics,
)
from musiclm_kernels.registry import implementations
from musiclm_kernels.sampling import sample_logits, sample_next_token

__all__ = [
    "HyperConnection",
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
    "implementations",
    "qk_l2norm",
    "quantize_weight",
    "random_words",
    "reference",
    "rvq_apply_statistics",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "rvq_replacements",
    "rvq_statistics",
    "sample_logits",
    "sample_next_token",
]
