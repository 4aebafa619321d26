"""The options of vector-quantize-pytorch: those that the classes here have, and those refused."""

from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """Keyword arguments of every quantiser here, with the meaning and the default they have there.

    Args:
        heads: 1.
        decay: of the moving averages that the codebooks follow.
        eps: what Laplace smoothing adds to every code's weight.
        freeze_codebook: the codebooks stay as they are in training.
        kmeans_init: the first batch initialises the codebooks; until then they are zeros.
        kmeans_iters: Lloyd steps of that.
        sync_kmeans: that batch is the batches of all processes; otherwise process 0's.
        threshold_ema_dead_code: a code that fewer vectors a batch choose, on average, becomes a
            vector of the batch; 0: none does. The fresh code counts as if an even share of the
            vectors chose it, which gives it time.
        dead_share: in its place, the share of an even share of a batch's vectors; for batches with
            fewer vectors than there are codes, of which any number would replace all or none. The
            codes of the first batch then begin with an even share too. With several processes,
            each must have equally many vectors. Not an option there.
        channel_last: vectors [B, ..., dim]; otherwise [B, dim, ...].
        accept_image_fmap: vectors [B, dim, height, width].
        accept_3d_fmap: vectors [B, dim, depth, height, width].
        commitment_weight: of the commitment loss.
        rotation_trick: the gradient is that of the rotation (see `gradient`) rather than straight
            through; None: for vectors of two dimensions or more.
        sync_codebook: all processes of torch.distributed share their statistics; None: if there
            are several.
        return_zeros_for_masked_padding: vectors that the mask leaves out become zeros; otherwise
            they come back as they were.

    Raises:
        ValueError: heads is not 1, or a number is out of range.
    """

    heads: int = 1
    decay: float = 0.8
    eps: float = 1e-5
    freeze_codebook: bool = False
    kmeans_init: bool = False
    kmeans_iters: int = 10
    sync_kmeans: bool = True
    threshold_ema_dead_code: float = 0
    dead_share: float | None = None
    channel_last: bool = True
    accept_image_fmap: bool = False
    accept_3d_fmap: bool = False
    commitment_weight: float = 1.0
    rotation_trick: bool | None = None
    sync_codebook: bool | None = None
    return_zeros_for_masked_padding: bool = True

    def __post_init__(self) -> None:
        if self.heads != 1:
            raise ValueError(f"heads is {self.heads}, wanted 1: {PACKAGE}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}, wanted within [0, 1)")
        for name in ("eps", "kmeans_iters"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted more than 0")
        for name in ("threshold_ema_dead_code", "dead_share", "commitment_weight"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 or more")

    @classmethod
    def of(cls, given: dict[str, Any], refused: dict[str, Any]) -> Self:
        """From keyword arguments.

        Raises:
            ValueError: an option that is not had here has another value than its default.
            TypeError: there is no such option.
        """
        names = {field.name for field in fields(cls)}
        refuse({name: value for name, value in given.items() if name not in names}, refused)
        return cls(**{name: value for name, value in given.items() if name in names})


PACKAGE = "use the vector_quantize_pytorch package for more"

# Refused, with their defaults in release 1.32.0.
OF_A_QUANTIZER: dict[str, Any] = {
    "separate_codebook_per_head": False,
    "use_cosine_sim": False,
    "layernorm_after_project_in": False,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "ema_update": None,
    "vq_bridge": None,
    "manual_ema_update": False,
    "learnable_codebook": None,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
    "route_gradients_to_input": True,
}
OF_A_RESIDUAL_QUANTIZER: dict[str, Any] = OF_A_QUANTIZER | {
    "shared_codebook": False,
    "diveq": False,
    "implicit_neural_codebook": False,
    "mlp_kwargs": {},
    "beam_size": None,
    "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
    "quant_grad_frac": 0.0,
}
OF_A_CALL: dict[str, Any] = {
    "topk": None,
    "sample_codebook_temp": None,
    "return_loss_breakdown": False,
    "codebook_transform_fn": None,
    "ema_update_weight": None,
    "accum_ema_update": False,
    "ema_update": None,
    "beam_size": None,
}
# Values that change nothing, though they are not the default.
HARMLESS: dict[str, Any] = {"ema_update": True, "learnable_codebook": False}
INSTEAD = {
    "straight_through": "it means Gumbel samples there; rotation_trick=False is the plain "
    "straight-through gradient",
}


def refuse(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Let options pass that have their default.

    Raises:
        ValueError: an option has another value.
        TypeError: there is no such option.
    """
    for name, value in given.items():
        if name not in defaults:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if not isinstance(value, Tensor) and value in (defaults[name], HARMLESS.get(name)):
            continue
        instead = INSTEAD.get(name, PACKAGE)
        raise ValueError(f"{name} is {value!r}, wanted {defaults[name]!r}: {instead}")
