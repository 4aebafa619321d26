"""The quantiser of a codec, of which there are three kinds, as the layers around it use it."""

from importlib import import_module
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from musiclm_engine.quantize import GroupedResidualVQ


def residual_vq(dim: int, num_quantizers: int, codebook_size: int, groups: int = 1) -> nn.Module:
    """Codebooks that live on small batches too: with fewer vectors in a batch than there are codes,
    a threshold in vectors would replace every code at every step. Half of the clips of a batch use
    a random prefix of the levels, so that one codec serves every bit rate (SoundStream, arXiv
    2107.03312, section III-C)."""
    return GroupedResidualVQ(
        dim=dim,
        groups=groups,
        num_quantizers=num_quantizers,
        codebook_size=codebook_size,
        decay=0.99,
        kmeans_init=True,
        dead_share=0.1,
        commitment_weight=0.0,
        quantize_dropout=True,
        quantize_dropout_share=0.5,
    )


def of_vector_quantize_pytorch(name: str, **arguments: Any) -> nn.Module:
    """A quantiser of that package, which trains by its own losses and gradients.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        package = import_module("vector_quantize_pytorch")
    except ImportError as error:
        raise ImportError(
            f"{name} comes from another package: pip install vector-quantize-pytorch"
        ) from error
    return getattr(package, name)(quantize_dropout=True, **arguments)


def quantize(rq: nn.Module, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [B, T, D] -> quantised, with a gradient in training, and the loss that draws latents
    to their codes, in training and evaluation alike."""
    quantized, _, *losses = rq(latent)
    if isinstance(rq, GroupedResidualVQ):
        return quantized, F.mse_loss(latent, quantized.detach())
    return quantized, sum((loss.sum() for loss in losses), latent.new_zeros(()))


@torch.no_grad()
def encode(rq: nn.Module, latent: Tensor) -> Tensor:
    """Latents [B, T, D] -> codes [B, T, Q * groups], the coarse levels of all groups first."""
    was_training = rq.training
    try:
        codes = rq.eval()(latent)[1]
    finally:
        rq.train(was_training)
    return rearrange(codes, "g b t q -> b t (q g)").long()


@torch.no_grad()
def decode(rq: Any, codes: Tensor, num_quantizers: int) -> Tensor:
    """Codes [B, T, q <= num_quantizers, of all groups] -> latents [B, T, D]; -1 adds nothing."""
    codes = F.pad(codes, (0, num_quantizers - codes.shape[2]), value=-1)
    return rq.get_output_from_indices(rearrange(codes, "b t (q g) -> g b t q", g=rq.groups))
