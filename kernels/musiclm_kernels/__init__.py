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
from musiclm_kernels.decode import decode_attention
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
from musiclm_kernels.sampling import sample_logits

__all__ = [
    "biased_attention",
    "contrastive_gradient",
    "contrastive_loss",
    "contrastive_statistics",
    "decode_attention",
    "drop_patches",
    "embed_patches",
    "implementations",
    "qk_l2norm",
    "random_words",
    "reference",
    "rvq_apply_statistics",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "rvq_replacements",
    "rvq_statistics",
    "sample_logits",
]
