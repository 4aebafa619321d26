from musiclm_kernels.decode.append_op import append_to_cache
from musiclm_kernels.decode.op import decode_attention

__all__ = ["append_to_cache", "decode_attention"]
