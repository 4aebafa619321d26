"""Residual vector quantisation as PyTorch ops: schemas, shape rules, the public functions."""

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, INTS, check_device, check_dims, check_dtype
from musiclm_kernels.quantize import certified, reference
from musiclm_kernels.registry import define_op

MODES = ("exact", "fast")


def _fake_encode(x: Tensor, codebooks: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    wide = torch.promote_types(x.dtype, torch.promote_types(codebooks.dtype, torch.float32))
    codes = x.new_empty(N, codebooks.shape[0], dtype=torch.int64)
    return codes, x.new_empty(N, D, dtype=wide)


def _fake_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    wide = torch.promote_types(codebooks.dtype, torch.float32)
    return codebooks.new_empty(codes.shape[0], codebooks.shape[2], dtype=wide)


_rvq_encode = define_op(
    "rvq_encode",
    "(Tensor x, Tensor codebooks, str mode) -> (Tensor, Tensor)",
    certified.rvq_encode,
    _fake_encode,
    kernel="musiclm_kernels.quantize.encode:rvq_encode",
)
_rvq_decode = define_op(
    "rvq_decode",
    "(Tensor codes, Tensor codebooks) -> Tensor",
    reference.rvq_decode,
    _fake_decode,
    kernel="musiclm_kernels.quantize.decode:rvq_decode",
)


def rvq_encode(x: Tensor, codebooks: Tensor, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    """Quantise each vector in Q levels: at each the code nearest to the residual
    r = x - (the codes chosen so far), argmin_k |r - codebooks[q, k]|, lowest index on ties.

    Not differentiable: a straight-through estimate is the caller's, x + (quantized - x).detach().

    Args:
        x: [N, D], any float dtype; D at most 512 on CUDA.
        codebooks: [Q, K, D], any float dtype.
        mode: "exact": on CPU the codes that float64 finds. On CUDA the factors of a product have
            22 bits and its sum is fp32, so that another code is chosen only where its distance is
            the smallest one's to within a bound (`encode.relative_error`). "fast": fp32 on CPU;
            on CUDA the factors have 11 bits. float64 in x or codebooks runs in float64 everywhere.

    Returns:
        codes [N, Q] int64, and quantized [N, D]: the sum of the chosen codes, float32, or float64
        where x or codebooks are; equal to `rvq_decode(codes, codebooks)`.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or an unknown mode.

    Source: SoundStream (arXiv 2107.03312, section III-C, algorithm 1).
    """
    check_dims("x", x, "N D")
    check_dtype("x", x, *FLOATS)
    check_codebooks(codebooks, x)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, wanted one of {MODES}")
    if codebooks.dtype == torch.float64:
        x = x.double()  # an op's first argument says whether its kernel runs
    return _rvq_encode(x.detach(), codebooks.detach(), mode)


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum over levels of codebooks[q, codes[:, q]]; code -1 adds nothing. Not differentiable.

    Args:
        codes: [N, q] int64 or int32 in -1 to K - 1, with q <= Q: fewer levels decode more coarsely.
        codebooks: [Q, K, D], any float dtype.

    Returns:
        [N, D] float32, or float64 for float64 codebooks; the sum runs in that, level 0 first.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above. A code out of range is
            refused on CPU only: on CUDA, where the look would synchronise, it adds nothing.

    Source: SoundStream (arXiv 2107.03312, section III-C).
    """
    check_dims("codebooks", codebooks, "Q K D")
    check_dtype("codebooks", codebooks, *FLOATS)
    check_codes(codes, codebooks)
    return _rvq_decode(codes, codebooks.detach())


def check_codebooks(codebooks: Tensor, x: Tensor) -> None:
    check_dims("codebooks", codebooks, "Q K D")
    if 0 in codebooks.shape[:2] or codebooks.shape[2] != x.shape[1]:
        raise ValueError(
            f"codebooks has shape {tuple(codebooks.shape)}, wanted (Q, K, {x.shape[1]})"
            " with Q and K at least 1"
        )
    check_dtype("codebooks", codebooks, *FLOATS)
    check_device("codebooks", codebooks, x.device)


def check_codes(codes: Tensor, codebooks: Tensor) -> None:
    check_dims("codes", codes, "N Q")
    if codes.shape[1] > codebooks.shape[0]:
        raise ValueError(
            f"codes has {codes.shape[1]} levels, wanted at most {codebooks.shape[0]}, as codebooks"
        )
    check_dtype("codes", codes, *INTS)
    check_device("codes", codes, codebooks.device)
