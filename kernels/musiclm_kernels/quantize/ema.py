"""Training of residual codebooks as PyTorch ops: schemas, shape rules, the public functions."""

import math

import torch
from torch import Tensor

from musiclm_kernels.checks import FLOATS, check_device, check_dims, check_dtype, check_shape
from musiclm_kernels.quantize import ema_reference as reference
from musiclm_kernels.quantize.op import check_codebooks, check_codes
from musiclm_kernels.registry import define_op

MAX_ROWS = 2**32  # of all processes: a row's number is half of a draw


# The ops take codebooks first: their dtype says whether a kernel runs.


def _statistics(
    codebooks: Tensor, x: Tensor, codes: Tensor, seed: Tensor, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.rvq_statistics(x, codes, codebooks, seed=seed, first_row=first_row)


def _fake_statistics(codebooks: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    Q, K, _D = codebooks.shape
    return (
        codebooks.new_empty(Q, K),
        codebooks.new_empty(codebooks.shape),
        codebooks.new_empty(Q, K, dtype=torch.int64),
    )


def _replacements(
    codebooks: Tensor,
    x: Tensor,
    codes: Tensor,
    cluster_size: Tensor,
    counts: Tensor,
    draws: Tensor,
    decay: float,
    dead_threshold: float,
    first_row: int,
) -> Tensor:
    return reference.rvq_replacements(
        x, codes, codebooks, cluster_size, counts, draws,
        decay=decay, dead_threshold=dead_threshold, first_row=first_row,
    )  # fmt: skip


def _fake_replacements(codebooks: Tensor, *_: object) -> Tensor:
    return codebooks.new_empty(codebooks.shape)


def _apply_statistics(
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    replacements: Tensor,
    decay: float,
    dead_threshold: float,
    eps: float,
) -> None:
    reference.rvq_apply_statistics(
        codebooks, cluster_size, cluster_sum, counts, sums, replacements,
        decay=decay, dead_threshold=dead_threshold, eps=eps,
    )  # fmt: skip


def _ema_update(
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    x: Tensor,
    codes: Tensor,
    seed: Tensor,
    decay: float,
    dead_threshold: float,
    eps: float,
) -> None:
    reference.rvq_ema_update(
        x, codes, codebooks, cluster_size, cluster_sum,
        decay=decay, dead_threshold=dead_threshold, seed=seed, eps=eps,
    )  # fmt: skip


def _fake_in_place(*_: object) -> None:
    return None


_rvq_statistics = define_op(
    "rvq_statistics",
    "(Tensor codebooks, Tensor x, Tensor codes, Tensor seed, SymInt first_row) "
    "-> (Tensor, Tensor, Tensor)",
    _statistics,
    _fake_statistics,
    kernel="musiclm_kernels.quantize.ema_statistics:rvq_statistics",
)
_rvq_replacements = define_op(
    "rvq_replacements",
    "(Tensor codebooks, Tensor x, Tensor codes, Tensor cluster_size, Tensor counts, Tensor draws, "
    "float decay, float dead_threshold, SymInt first_row) -> Tensor",
    _replacements,
    _fake_replacements,
    kernel="musiclm_kernels.quantize.ema_averages:rvq_replacements",
)
_rvq_apply_statistics = define_op(
    "rvq_apply_statistics",
    "(Tensor(a!) codebooks, Tensor(b!) cluster_size, Tensor(c!) cluster_sum, Tensor counts, "
    "Tensor sums, Tensor replacements, float decay, float dead_threshold, float eps) -> ()",
    _apply_statistics,
    _fake_in_place,
    kernel="musiclm_kernels.quantize.ema_averages:rvq_apply_statistics",
)
_rvq_ema_update = define_op(
    "rvq_ema_update",
    "(Tensor(a!) codebooks, Tensor(b!) cluster_size, Tensor(c!) cluster_sum, Tensor x, "
    "Tensor codes, Tensor seed, float decay, float dead_threshold, float eps) -> ()",
    _ema_update,
    _fake_in_place,
    kernel="musiclm_kernels.quantize.ema_averages:rvq_ema_update",
)


def rvq_ema_update(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    seed: int | Tensor,
    eps: float = 1e-5,
) -> None:
    """Train the codebooks by moving averages, in place, every level from the residuals that the
    codebooks of before this call leave:

        cluster_size = decay * cluster_size + (1 - decay) * (vectors that chose the code)
        cluster_sum  = decay * cluster_sum  + (1 - decay) * (the sum of those vectors)
        codebooks    = cluster_sum / (cluster_size, Laplace-smoothed by eps, its sum unchanged)

    A code whose cluster_size falls under dead_threshold is replaced by a residual of this batch; its
    cluster_size becomes an even share of all (dead_threshold if that is more), which gives it time
    to find its vectors, and its cluster_sum the vector times that. A level that no vector reached
    stays as it is. Start from cluster_size = 1 and cluster_sum = codebooks.

    Which vector: at each level a row enters one of K draws, which Philox chooses from the seed, the
    level and the row, and the least key wins it. Dead codes take the winners in turn, so that no
    row comes twice before every winner has (at least 63 % of min(rows, K), on average).

    The same arguments give the same bits on every run, and nothing waits for the device: a CUDA
    graph can hold the call. Several processes with a part of a batch each call `rvq_statistics`,
    `rvq_replacements` and `rvq_apply_statistics` instead, and add up between them.

    Args:
        x: [N, D], any float dtype: what was encoded.
        codes: [N, q] int64 or int32 in -1 to K - 1, q <= Q; a row counts nowhere where it has -1,
            nor where its residual is not finite.
        codebooks: [Q, K, D] float32 or float64, finite; written.
        cluster_size: [Q, K], codebooks' dtype; written.
        cluster_sum: [Q, K, D], codebooks' dtype; written.
        decay: of the averages, within [0, 1).
        dead_threshold: in vectors per batch; 0 replaces nothing.
        seed: an int64, or an int64 tensor [] on x's device; give another one at each step.
        eps: the weight that smoothing adds to every code.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or a number is outside
            its range (a code: on CPU only, elsewhere the look would synchronise).

    Source: SoundStream (arXiv 2107.03312, section III-C); the averages as in VQ-VAE
    (arXiv 1711.00937, appendix A.1).
    """
    _check_rows(x, codes, codebooks)
    _check_averages(codebooks, cluster_size, cluster_sum)
    _check_numbers(decay, dead_threshold, eps)
    _rvq_ema_update(
        codebooks.detach(), cluster_size.detach(), cluster_sum.detach(), x.detach(), codes,
        _as_tensor(seed, x.device), decay, dead_threshold, eps,
    )  # fmt: skip


def rvq_statistics(
    x: Tensor, codes: Tensor, codebooks: Tensor, *, seed: int | Tensor, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The first of three steps of `rvq_ema_update`, for a part of a batch: what is added up over
    all parts.

    Args:
        x: [N, D], any float dtype.
        codes: [N, q] int64 or int32 in -1 to K - 1, q <= Q; a row counts nowhere where it has -1,
            nor where its residual is not finite.
        codebooks: [Q, K, D] float32 or float64, finite: those the codes were chosen from.
        seed: an int64, or an int64 tensor [] on x's device; the same for all parts.
        first_row: x's first row as a row of the whole batch, which has at most 2^32.

    Returns:
        counts [Q, K] and sums [Q, K, D] in codebooks' dtype: how many rows chose each code, and the
        sum of their residuals, x less the codes chosen before. Over all parts: their sums.
        draws [Q, K] int64: the row that won each draw, as key * 2^32 + row; 2^63 - 1 if no row
        entered it. Over all parts: their minimum.
        Residuals are taken in codebooks' dtype. Sums of float32 are as good as exact: they run in
        float64, or on CUDA in 64-bit integers, whose unit is 2^-35 of the largest of |x| and
        |codebooks| or less at 2^20 rows and 32 levels, and are rounded once.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or a number is outside
            its range (a code: on CPU only, elsewhere the look would synchronise).

    Source: as `rvq_ema_update`.
    """
    _check_rows(x, codes, codebooks)
    _check_first_row(first_row, x)
    return _rvq_statistics(
        codebooks.detach(), x.detach(), codes, _as_tensor(seed, x.device), first_row
    )


def rvq_replacements(
    x: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    cluster_size: Tensor,
    counts: Tensor,
    draws: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    first_row: int = 0,
) -> Tensor:
    """The second of three steps of `rvq_ema_update`, for a part of a batch: the vectors that dead
    codes become.

    Args:
        x, codes, codebooks, first_row: as for `rvq_statistics`.
        cluster_size: [Q, K], codebooks' dtype.
        counts: [Q, K], codebooks' dtype; of all parts.
        draws: [Q, K] int64; of all parts.
        decay, dead_threshold: as for `rvq_ema_update`.

    Returns:
        [Q, K, D], codebooks' dtype: the residual that a dead code is to become, if its row lies in
        this part; zeros elsewhere. Over all parts: their sum.

    Raises:
        ValueError: as `rvq_statistics`.

    Source: as `rvq_ema_update`.
    """
    _check_rows(x, codes, codebooks)
    _check_first_row(first_row, x)
    Q, K, _ = codebooks.shape
    for name, statistic in (("cluster_size", cluster_size), ("counts", counts), ("draws", draws)):
        check_shape(name, statistic, Q, K)
        check_dtype(name, statistic, torch.int64 if name == "draws" else codebooks.dtype)
        check_device(name, statistic, codebooks.device)
    _check_numbers(decay, dead_threshold)
    return _rvq_replacements(
        codebooks.detach(), x.detach(), codes, cluster_size.detach(), counts, draws,
        decay, dead_threshold, first_row,
    )  # fmt: skip


def rvq_apply_statistics(
    codebooks: Tensor,
    cluster_size: Tensor,
    cluster_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    replacements: Tensor,
    *,
    decay: float,
    dead_threshold: float,
    eps: float = 1e-5,
) -> None:
    """The last of three steps of `rvq_ema_update`: move the averages and the codebooks, in place.

    Args:
        codebooks, cluster_size, cluster_sum, decay, dead_threshold, eps: as for `rvq_ema_update`.
        counts: [Q, K], codebooks' dtype; of all parts of the batch.
        sums: [Q, K, D], codebooks' dtype; of all parts.
        replacements: [Q, K, D], codebooks' dtype; of all parts.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above, or a number is outside
            its range.

    Source: as `rvq_ema_update`.
    """
    check_dims("codebooks", codebooks, "Q K D")
    check_dtype("codebooks", codebooks, torch.float32, torch.float64)
    _check_averages(codebooks, cluster_size, cluster_sum)
    check_shape("counts", counts, *codebooks.shape[:2])
    check_shape("sums", sums, *codebooks.shape)
    check_shape("replacements", replacements, *codebooks.shape)
    for name, statistic in (("counts", counts), ("sums", sums), ("replacements", replacements)):
        check_dtype(name, statistic, codebooks.dtype)
        check_device(name, statistic, codebooks.device)
    _check_numbers(decay, dead_threshold, eps)
    _rvq_apply_statistics(
        codebooks.detach(), cluster_size.detach(), cluster_sum.detach(),
        counts, sums, replacements, decay, dead_threshold, eps,
    )  # fmt: skip


def _check_rows(x: Tensor, codes: Tensor, codebooks: Tensor) -> None:
    check_dims("x", x, "N D")
    check_dtype("x", x, *FLOATS)
    check_codebooks(codebooks, x)
    check_dtype("codebooks", codebooks, torch.float32, torch.float64)
    check_codes(codes, codebooks)
    if codes.shape[0] != x.shape[0]:
        raise ValueError(f"codes has {codes.shape[0]} rows, wanted {x.shape[0]}, as x")


def _check_averages(codebooks: Tensor, cluster_size: Tensor, cluster_sum: Tensor) -> None:
    check_shape("cluster_size", cluster_size, *codebooks.shape[:2])
    check_shape("cluster_sum", cluster_sum, *codebooks.shape)
    for name, average in (("cluster_size", cluster_size), ("cluster_sum", cluster_sum)):
        check_dtype(name, average, codebooks.dtype)
        check_device(name, average, codebooks.device)


def _check_first_row(first_row: int, x: Tensor) -> None:
    if not 0 <= first_row <= MAX_ROWS - x.shape[0]:
        raise ValueError(
            f"first_row is {first_row} for {x.shape[0]} rows, wanted 0 to {MAX_ROWS - x.shape[0]}"
        )


def _check_numbers(decay: float, dead_threshold: float, eps: float = 1.0) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, wanted within [0, 1)")
    if not 0 <= dead_threshold < math.inf:
        raise ValueError(f"dead_threshold is {dead_threshold}, wanted a finite number, 0 or more")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}, wanted a finite number above 0")


def _as_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    check_shape("seed", seed)
    check_dtype("seed", seed, torch.int64)
    check_device("seed", seed, device)
    return seed
