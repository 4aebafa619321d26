"""What MuLaN's loss learns beside the towers: its scalars, and latents of layers before the last."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_TEMPERATURE = 10.0  # factor on the cosines: MuLan's tau of 0.1
MAX_TEMPERATURE = 100.0  # as in CLIP (arXiv 2103.00020, section 2.5)
INITIAL_SIGMOID_BIAS = -10.0  # arXiv 2303.15343, section 3.2


class Contrast(nn.Module):
    """The learned scalars of the losses of L layers; a bias for the sigmoid loss alone."""

    bias: nn.Parameter | None

    def __init__(self, with_bias: bool, num_layers: int = 1):
        super().__init__()
        shape = (num_layers, 1, 1)
        self.temperatures = nn.Parameter(torch.full(shape, math.log(INITIAL_TEMPERATURE)))
        bias = torch.full(shape, INITIAL_SIGMOID_BIAS) if with_bias else None
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self) -> Tensor:
        """The temperatures, (L,)."""
        limit = math.log(MAX_TEMPERATURE)
        if self.training:
            # Held at the limit itself: beyond it no gradient would bring the parameter back.
            self.temperatures.data.clamp_(0, limit)
        return self.temperatures.clamp(0, limit).exp().flatten()


class MultiLayerContrast(nn.Module):
    """Latents of L earlier layers of both towers, and the scalars of their losses.

    Alignment at several depths as in ViCHA (Shukor et al., arXiv 2208.13628). A layer has a norm's
    gain and a projection of its own, under the names and shapes of musiclm-pytorch. Projections
    start as those of the last layer do, as an `nn.Linear`.
    """

    def __init__(
        self, audio_dim: int, text_dim: int, dim_latent: int, num_layers: int, with_bias: bool
    ):
        super().__init__()
        L, E = num_layers, dim_latent
        self.audio_gamma = nn.Parameter(torch.ones(L, 1, audio_dim))
        self.audio_latent_weight = nn.Parameter(_as_linear(audio_dim, L, audio_dim, E))
        self.audio_latent_bias = nn.Parameter(_as_linear(audio_dim, L, 1, E))
        self.text_gamma = nn.Parameter(torch.ones(L, 1, text_dim))
        self.text_latent_weight = nn.Parameter(_as_linear(text_dim, L, text_dim, E))
        self.text_latent_bias = nn.Parameter(_as_linear(text_dim, L, 1, E))
        self.contrast = Contrast(with_bias, L)

    def audio_latents(self, layers: Tensor) -> Tensor:
        """(L, B, audio_dim) -> (B, L, dim_latent), not l2-normalised."""
        return _latents(layers, self.audio_gamma, self.audio_latent_weight, self.audio_latent_bias)

    def text_latents(self, layers: Tensor) -> Tensor:
        """(L, B, text_dim) -> (B, L, dim_latent), not l2-normalised."""
        return _latents(layers, self.text_gamma, self.text_latent_weight, self.text_latent_bias)


def checked_num_layers(num_layers: int | None, audio_depth: int, text_depth: int) -> int:
    """How many layers the hierarchical loss compares beside the last; None is all it can.

    Raises:
        ValueError: towers of one layer, or a number that is not in [1, least depth - 1].
    """
    most = min(audio_depth, text_depth) - 1
    if most < 1:
        raise ValueError(
            "hierarchical_contrastive_loss wants towers with a layer before the last; "
            f"audio_transformer.depth={audio_depth}, text_transformer.depth={text_depth}"
        )
    if num_layers is None:
        return most
    if not 1 <= num_layers <= most:
        raise ValueError(
            f"hierarchical_contrastive_loss_layers={num_layers}; want 1 to {most}, less than the "
            f"depth of either tower ({audio_depth} and {text_depth})"
        )
    return num_layers


def spread_layers(num_layers: int, depth: int) -> Tensor:
    """`num_layers` of a tower's layers at even distances from the first; never the last."""
    return torch.arange(num_layers) * depth // num_layers


def _latents(layers: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed = F.layer_norm(layers, layers.shape[-1:]) * gamma
    return torch.baddbmm(bias, normed, weight).transpose(0, 1)


def _as_linear(num_inputs: int, *shape: int) -> Tensor:
    bound = num_inputs**-0.5
    return torch.empty(shape).uniform_(-bound, bound)
