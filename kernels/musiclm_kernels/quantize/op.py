"""Residual vector quantisation as PyTorch ops: schemas, shape rules, the public functions."""

import math

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, INTS, check_device, check_dims, check_dtype, check_shape
from musiclm_kernels.quantize import reference
from musiclm_kernels.registry import define_op

MODES = ("exact", "fast")


def _encode(x: Tensor, codebooks: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return reference.rvq_encode(x, codebooks, mode=mode)


def _fake_encode(x: Tensor, codebooks: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    wide = torch.promote_types(x.dtype, torch.promote_types(codebooks.dtype, torch.float32))
    return (
        x.new_empty(N, codebooks.shape[0], dtype=torch.int64),
        x.new_empty(N, D, dtype=wide),
    )


def _fake_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    wide = torch.promote_types(codebooks.dtype, torch.float32)
    return codebooks.new_empty(codes.shape[0], codebooks.shape[2], dtype=wide)


def _ema_update(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    decay: float,
    dead_threshold: float,
    seed: int,
    eps: float,
) -> None:
    reference.rvq_ema_update(
        x, codes, codebooks, cluster_size, cluster_sum,
        decay=decay, dead_threshold=dead_threshold, seed=seed, eps=eps,
    )  # fmt: skip


def _fake_ema_update(*_: object) -> None:
    return None


_rvq_encode = define_op(
    "rvq_encode",
    "(Tensor x, Tensor codebooks, str mode) -> (Tensor, Tensor)",
    _encode,
    _fake_encode,
)
_rvq_decode = define_op(
    "rvq_decode", "(Tensor codes, Tensor codebooks) -> Tensor", reference.rvq_decode, _fake_decode
)
_rvq_ema_update = define_op(
    "rvq_ema_update",
    "(Tensor x, Tensor codes, Tensor(a!) codebooks, Tensor(b!) cluster_size, "
    "Tensor(c!) cluster_sum, float decay, float dead_threshold, SymInt seed, float eps) -> ()",
    _ema_update,
    _fake_ema_update,
)


def rvq_encode(x: Tensor, codebooks: Tensor, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    """Quantise each vector in Q levels: at each the code nearest to the residual
    r = x - (the codes chosen so far), argmin_k |r - codebooks[q, k]|, lowest index on ties.

    Not differentiable: a straight-through estimate is the caller's, x + (quantized - x).detach().

    Args:
        x: [N, D], any float dtype.
        codebooks: [Q, K, D], any float dtype.
        mode: "exact": distances in float64, so that codes are the true nearest. "fast": distances
            in at least fp32 here, and a CUDA kernel may round the factors to bf16, which picks
            another code where two are nearly as near.

    Returns:
        codes [N, Q] int64, and quantized [N, D]: the sum of the chosen codes, float32, or float64
        where x or codebooks are; equal to `rvq_decode(codes, codebooks)`.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or an unknown mode.

    Source: SoundStream (arXiv 2107.03312, section III-C, algorithm 1).
    """
    check_dims("x", x, "N D")
    check_dtype("x", x, *FLOATS)
    _check_codebooks(codebooks, x)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, wanted one of {MODES}")
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
            refused on CPU only: elsewhere the look would synchronise.

    Source: SoundStream (arXiv 2107.03312, section III-C).
    """
    check_dims("codebooks", codebooks, "Q K D")
    check_dtype("codebooks", codebooks, *FLOATS)
    _check_codes(codes, codebooks)
    return _rvq_decode(codes, codebooks.detach())


def rvq_ema_update(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    seed: int,
    eps: float = 1e-5,
) -> None:
    """Train the codebooks by moving averages, in place, every level from the residuals that the
    codebooks of before this call leave:

        cluster_size = decay * cluster_size + (1 - decay) * (vectors that chose the code)
        cluster_sum  = decay * cluster_sum  + (1 - decay) * (the sum of those vectors)
        codebooks    = cluster_sum / (cluster_size, Laplace-smoothed by eps, its sum unchanged)

    A code whose cluster_size falls under dead_threshold is replaced by a residual of this batch,
    drawn by Philox from seed without repeating a row while rows last; its cluster_size becomes
    an even share of all (dead_threshold if that is more), which gives it time to find its vectors,
    and its cluster_sum the vector times that. A level that no vector reached stays
    as it is. The same arguments give the same bits. Start from cluster_size = 1 and
    cluster_sum = codebooks.

    Args:
        x: [N, D], any float dtype: what was encoded.
        codes: [N, q] int64 or int32 in -1 to K - 1, q <= Q; a row is ignored where it has -1.
        codebooks: [Q, K, D] float32 or float64; written.
        cluster_size: [Q, K], codebooks' dtype; written.
        cluster_sum: [Q, K, D], codebooks' dtype; written.
        decay: of the averages, within [0, 1).
        dead_threshold: in vectors per batch; 0 replaces nothing.
        seed: an int64; give another one at each step.
        eps: the weight that smoothing adds to every code.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or a number is outside
            its range (a code: on CPU only, elsewhere the look would synchronise).

    Source: SoundStream (arXiv 2107.03312, section III-C); the averages as in VQ-VAE
    (arXiv 1711.00937, appendix A.1).
    """
    check_dims("x", x, "N D")
    check_dtype("x", x, *FLOATS)
    _check_codebooks(codebooks, x)
    check_dtype("codebooks", codebooks, torch.float32, torch.float64)
    _check_codes(codes, codebooks)
    if codes.shape[0] != x.shape[0]:
        raise ValueError(f"codes has {codes.shape[0]} rows, wanted {x.shape[0]}, as x")
    Q, K, D = codebooks.shape
    check_shape("cluster_size", cluster_size, Q, K)
    check_shape("cluster_sum", cluster_sum, Q, K, D)
    for name, statistic in (("cluster_size", cluster_size), ("cluster_sum", cluster_sum)):
        check_dtype(name, statistic, codebooks.dtype)
        check_device(name, statistic, codebooks.device)
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, wanted within [0, 1)")
    if not 0 <= dead_threshold < math.inf:
        raise ValueError(f"dead_threshold is {dead_threshold}, wanted a finite number, 0 or more")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}, wanted a finite number above 0")
    _rvq_ema_update(
        x.detach(), codes, codebooks.detach(), cluster_size.detach(), cluster_sum.detach(),
        decay, dead_threshold, seed, eps,
    )  # fmt: skip


def _check_codebooks(codebooks: Tensor, x: Tensor) -> None:
    check_dims("codebooks", codebooks, "Q K D")
    if 0 in codebooks.shape[:2] or codebooks.shape[2] != x.shape[1]:
        raise ValueError(
            f"codebooks has shape {tuple(codebooks.shape)}, wanted (Q, K, {x.shape[1]})"
            " with Q and K at least 1"
        )
    check_dtype("codebooks", codebooks, *FLOATS)
    check_device("codebooks", codebooks, x.device)


def _check_codes(codes: Tensor, codebooks: Tensor) -> None:
    check_dims("codes", codes, "N Q")
    if codes.shape[1] > codebooks.shape[0]:
        raise ValueError(
            f"codes has {codes.shape[1]} levels, wanted at most {codebooks.shape[0]}, as codebooks"
        )
    check_dtype("codes", codes, *INTS)
    check_device("codes", codes, codebooks.device)
