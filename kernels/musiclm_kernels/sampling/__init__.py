from musiclm_kernels.sampling.next_token_op import sample_next_token
from musiclm_kernels.sampling.op import sample_logits

__all__ = ["sample_logits", "sample_next_token"]
