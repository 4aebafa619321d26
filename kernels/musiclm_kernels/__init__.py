"""MusicLM's operations as PyTorch ops, under `torch.ops.musiclm`.

Each op's body is its definition in plain PyTorch, on CPU and on CUDA; a Triton kernel can take its
place on CUDA. `implementations()` says what runs where.
"""

from musiclm_kernels import reference
from musiclm_kernels.attention import biased_attention
from musiclm_kernels.contrastive import contrastive_loss
from musiclm_kernels.decode import decode_attention
from musiclm_kernels.patch_dropout import drop_patches
from musiclm_kernels.qk_l2norm import qk_l2norm
from musiclm_kernels.quantize import rvq_decode, rvq_ema_update, rvq_encode
from musiclm_kernels.registry import implementations
from musiclm_kernels.sampling import sample_logits

__all__ = [
    "biased_attention",
    "contrastive_loss",
    "decode_attention",
    "drop_patches",
    "implementations",
    "qk_l2norm",
    "reference",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "sample_logits",
]
