from musiclm_kernels.sampling.op import sample_logits

__all__ = ["sample_logits"]
