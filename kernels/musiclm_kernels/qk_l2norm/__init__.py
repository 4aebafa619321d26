from musiclm_kernels.qk_l2norm.op import qk_l2norm

__all__ = ["qk_l2norm"]
