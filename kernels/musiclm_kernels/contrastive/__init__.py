from musiclm_kernels.contrastive.op import contrastive_loss

__all__ = ["contrastive_loss"]
