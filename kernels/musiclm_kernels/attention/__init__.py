from musiclm_kernels.attention.op import biased_attention

__all__ = ["biased_attention"]
