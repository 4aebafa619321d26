"""Patch dropout, and the audio tower's front end on it, as PyTorch ops: schemas, shape rules,
autograd, and the public functions."""

from typing import Any

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, INTS, check_device, check_dims, check_dtype, check_shape
from musiclm_kernels.patch_dropout import reference
from musiclm_kernels.registry import define_op, refuse_to_differentiate

MIN_D = 8  # two frequencies for each of the position's four parts

_PARAMETERS = (
    "Tensor patch_norm_weight, Tensor patch_norm_bias, Tensor weight, Tensor bias, "
    "Tensor norm_weight, Tensor norm_bias"
)


def _drop_reference(x: Tensor, keep: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = x.shape
    indices, slots, _ = reference.choose_patches(seed, None, B, N, keep, x.device)
    return reference.take_patches(x, indices, slots), indices, slots


def _drop_fake(x: Tensor, keep: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, N, D = x.shape
    indices = x.new_empty(B, keep, dtype=torch.int64)
    return x.new_empty(B, keep, D), indices, x.new_empty(B, N, dtype=torch.int32)


def _take_fake(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(*index.shape, x.shape[2])


def _embed_fake(
    spectrogram: Tensor,
    num_valid: Tensor | None,
    seed: Tensor | None,
    keep: int,
    patch_size: int,
    patch_norm_weight: Tensor,
    patch_norm_bias: Tensor,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, num_frames, num_bins = spectrogram.shape
    N = (num_frames // patch_size) * (num_bins // patch_size)
    empty = spectrogram.new_empty
    return (
        empty(B, keep, weight.shape[0], dtype=rest[-1]),
        empty(B, keep, dtype=torch.int64),
        empty(B, keep, dtype=torch.int32),
        empty(B, keep, dtype=torch.bool),
        empty(B, N, dtype=torch.int32),
    )


def _embed_fake_backward(
    grad_tokens: Tensor,
    spectrogram: Tensor,
    indices: Tensor,
    key_mask: Tensor,
    slots: Tensor,
    patch_size: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *parameters, wants_spectrogram = rest
    shape = spectrogram.shape if wants_spectrogram else (0,)
    return spectrogram.new_empty(shape), *(p.new_empty(p.shape) for p in parameters)


_drop_patches = define_op(
    "drop_patches",
    "(Tensor x, SymInt keep, Tensor seed) -> (Tensor, Tensor, Tensor)",
    _drop_reference,
    _drop_fake,
    kernel="musiclm_kernels.patch_dropout.kernel:drop_patches",
)
_take_patches = define_op(
    "take_patches",
    "(Tensor x, Tensor index, Tensor inverse) -> Tensor",
    reference.take_patches,
    _take_fake,
    kernel="musiclm_kernels.patch_dropout.kernel:take_patches",
)
_embed_patches = define_op(
    "embed_patches",
    "(Tensor spectrogram, Tensor? num_valid, Tensor? seed, SymInt keep, SymInt patch_size, "
    f"{_PARAMETERS}, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.tokens_and_places,
    _embed_fake,
    kernel="musiclm_kernels.patch_dropout.forward:tokens_and_places",
)
_embed_patches_backward = define_op(
    "embed_patches_backward",
    "(Tensor grad_tokens, Tensor spectrogram, Tensor indices, Tensor key_mask, Tensor slots, "
    f"SymInt patch_size, {_PARAMETERS}, bool wants_spectrogram) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.tokens_backward,
    _embed_fake_backward,
    kernel="musiclm_kernels.patch_dropout.backward:tokens_backward",
)


def _save_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])


def _drop_backward(ctx: Any, grad_kept: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    indices, slots = ctx.saved_tensors
    return _take_patches(grad_kept, slots, indices), None, None


def _save_indices(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _take_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return _take_patches(grad, inverse, index), None, None


torch.library.register_autograd("musiclm::drop_patches", _drop_backward, setup_context=_save_choice)
torch.library.register_autograd(
    "musiclm::take_patches", _take_backward, setup_context=_save_indices
)


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    spectrogram, _, _, _, ctx.patch_size, *parameters, _ = inputs
    _, indices, _, key_mask, slots = output
    ctx.save_for_backward(spectrogram, indices, key_mask, slots, *parameters)


def _embed_backward(ctx: Any, grad_tokens: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    spectrogram, indices, key_mask, slots, *parameters = ctx.saved_tensors
    wants_spectrogram = ctx.needs_input_grad[0]
    grad_spectrogram, *gradients = _embed_patches_backward(
        grad_tokens, spectrogram, indices, key_mask, slots, ctx.patch_size, *parameters,
        wants_spectrogram,
    )  # fmt: skip
    grad_spectrogram = grad_spectrogram if wants_spectrogram else None
    return (grad_spectrogram, None, None, None, None, *gradients, None)


torch.library.register_autograd(
    "musiclm::embed_patches", _embed_backward, setup_context=_embed_setup
)
refuse_to_differentiate("embed_patches_backward")


def drop_patches(x: Tensor, keep: int, *, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """Keep a random subset of each row's patches: `keep` of N, without replacement, every subset
    equally likely.

    The choice is counter-based: patch n of row b draws the Philox word at (seed, b * 2^32 + n), and
    the smallest words stay. So it depends on the seed, the row and the patch alone; PyTorch's
    generators are neither read nor advanced. Differentiable in x: a dropped patch has gradient zero.

    Args:
        x: [B, N, D], any float dtype.
        keep: patches that stay, 1 to N.
        seed: of the choice, an int64 or int64 [] where x is; give another one at each step.

    Returns:
        The kept patches [B, keep, D] in x's dtype, and which they were: [B, keep] int64, ascending.

    Raises:
        ValueError: x is not [B, N, D] of floats, keep is not within 1 to N, or a seed that is a
            tensor is not int64 [] where x is.

    Source: Patchout (Koutini et al., arXiv 2110.05069, section 2), unstructured.
    """
    check_dims("x", x, "B N D")
    check_dtype("x", x, *FLOATS)
    if not 1 <= keep <= x.shape[1]:
        raise ValueError(f"keep is {keep}, wanted 1 to {x.shape[1]}, the patches of x")
    kept, indices, _ = _drop_patches(x, keep, _seed(seed, x.device))
    return kept, indices


def embed_patches(
    spectrogram: Tensor,
    *,
    patch_size: int,
    patch_norm_weight: Tensor,
    patch_norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    keep: int | None = None,
    seed: int | Tensor | None = None,
    num_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From a spectrogram to the tokens of a random subset of its patches, which alone are read:

        token = LN(weight @ LN(patch) + bias) + position(column, row)

    The layer norms have nn.LayerNorm's epsilon, 1e-5. A patch is P x P values, those of its first
    bin in the order of time, then of its second; patches are numbered column by column,
    n = column * H + row of a grid of W columns in time by H rows in frequency. The position is the
    sines, then the cosines, of D / 4 frequencies from 1 to 1e-4 at the column, then at the row.

    Which patches stay is chosen as in `drop_patches`, among each row's valid ones: of V of them,
    V * keep / N rounded half up, and at least one. Differentiable, once, in the spectrogram and the
    six parameters; parameters' gradients are the same bits on every run.

    Args:
        spectrogram: [B, W * P, H * P] time by frequency, any float dtype.
        patch_size: P.
        patch_norm_weight, patch_norm_bias: [P * P].
        weight: [D, P * P], D a multiple of 4 from 8 on.
        bias, norm_weight, norm_bias: [D].
        keep: patches of a row without padding that stay, 1 to N = W * H; None keeps all.
        seed: of the choice, an int64 or int64 [] where the spectrogram is; needed if keep < N.
        num_valid: [B] int32 or int64, how many patches of each row, from the first on, hold
            something; None is N. Values outside 1 to N are taken as the nearest of these.

    The parameters share a dtype, or the norms' are float32; all are float64 if the spectrogram is.

    Returns:
        tokens: [B, keep, D] in the dtype of weight, under autocast in autocast's.
        indices: [B, keep] int64, the patch of each token; ascending as far as key_mask goes.
        codes: [B, keep] int32, column * (2 * H - 1) + row, as `biased_attention` takes them with
            grid_rows = H. No two of a row are alike.
        key_mask: [B, keep] bool, False for padding at the end of a row, of which tokens are zero
            and indices some patches that did not stay.

        Norms and sums run in fp32, or fp64 for float64 inputs. On CUDA the products' factors are in
        the tokens' dtype; those of float32 are as torch.set_float32_matmul_precision says.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or keep < N without seed.
        RuntimeError: a gradient of the gradient is asked for.

    Source: dual patch norm (arXiv 2302.01327, section 3), Patchout (arXiv 2110.05069, section 2),
    positions of Beyer et al. (arXiv 2205.01580). Each step is of one patch, so that dropping comes
    first without changing anything.
    """
    check_dims("spectrogram", spectrogram, "B T F")
    check_dtype("spectrogram", spectrogram, *FLOATS)
    B, num_frames, num_bins = spectrogram.shape
    sizes = (num_frames, num_bins)
    if patch_size < 1 or any(size < patch_size or size % patch_size for size in sizes):
        raise ValueError(
            f"patch_size is {patch_size}, wanted a divisor of the spectrogram's "
            f"{num_frames} frames and {num_bins} bins"
        )
    N = (num_frames // patch_size) * (num_bins // patch_size)
    parameters = {
        "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias,
        "patch_norm_weight": patch_norm_weight, "patch_norm_bias": patch_norm_bias,
    }  # fmt: skip
    _check_parameters(parameters, spectrogram, patch_size**2)
    keep = N if keep is None else keep
    if not 1 <= keep <= N:
        raise ValueError(f"keep is {keep}, wanted 1 to {N}, the patches of the spectrogram")
    if keep < N and seed is None:
        raise ValueError(f"seed is None, wanted one to choose {keep} of {N} patches")
    if num_valid is not None:
        check_shape("num_valid", num_valid, B)
        check_dtype("num_valid", num_valid, *INTS)
        check_device("num_valid", num_valid, spectrogram.device)
    device_type = spectrogram.device.type
    autocast = torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64
    return _embed_patches(
        spectrogram, num_valid, None if seed is None else _seed(seed, spectrogram.device),
        keep, patch_size, patch_norm_weight, patch_norm_bias, weight, bias, norm_weight, norm_bias,
        torch.get_autocast_dtype(device_type) if autocast else weight.dtype,
    )[:4]  # fmt: skip


def _seed(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        check_shape("seed", seed)
        check_dtype("seed", seed, torch.int64)
        check_device("seed", seed, device)
    return reference.seed_tensor(seed, device)


def _check_parameters(parameters: dict[str, Tensor], spectrogram: Tensor, width: int) -> None:
    weight = parameters["weight"]
    check_dims("weight", weight, "D P*P")
    D = weight.shape[0]
    if D < MIN_D or D % 4:
        raise ValueError(f"weight has {D} rows, wanted a multiple of 4, at least {MIN_D}")
    check_shape("weight", weight, D, width)
    exact = spectrogram.dtype == torch.float64
    check_dtype("weight", weight, *((torch.float64,) if exact else FLOATS[:3]))
    for name, parameter in parameters.items():
        if name != "weight":
            check_shape(name, parameter, width if name.startswith("patch_norm") else D)
        norms = "norm" in name and not exact
        check_dtype(name, parameter, weight.dtype, *((torch.float32,) if norms else ()))
        check_device(name, parameter, spectrogram.device)
