from musiclm_kernels.contrastive.op import (
    contrastive_gradient,
    contrastive_loss,
    contrastive_statistics,
)

__all__ = ["contrastive_gradient", "contrastive_loss", "contrastive_statistics"]
