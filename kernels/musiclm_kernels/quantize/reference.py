"""Residual vector quantisation in plain PyTorch.

Dimensions: N vectors, Q levels, K codes a level, D width. Code -1 means that a vector has no code
at that level (quantiser dropout): it adds nothing there.
"""

import torch
from torch import Tensor

from musiclm_kernels.ordered_sum import sum_rows_by_index
from musiclm_kernels.philox import WORD, random_words

CHUNK_ROWS = 2048  # the distances of so many vectors to 1024 codes are 16 MB
TIE = 1e-13  # relative: two float64 distances closer than this are one distance


def rvq_encode(x: Tensor, codebooks: Tensor, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    """Level after level, the nearest code to what the levels before left over.

    "exact" runs in float64 throughout. "fast" runs in fp32 (float64 for float64 inputs), where a
    kernel may round the factors of the product to bf16: its codes may differ in near-ties.
    """
    wide = torch.promote_types(x.dtype, torch.promote_types(codebooks.dtype, torch.float32))
    work = torch.float64 if mode == "exact" else wide
    books = codebooks.to(work)
    codes = torch.cat([_encode_rows(rows.to(work), books) for rows in x.split(CHUNK_ROWS)])
    return codes, rvq_decode(codes, codebooks.to(wide))


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum over levels of codebooks[q, codes[:, q]], in at least fp32."""
    _check_range(codes, codebooks)
    wide = torch.promote_types(codebooks.dtype, torch.float32)
    total = torch.zeros(codes.shape[0], codebooks.shape[2], dtype=wide, device=codes.device)
    for level in range(codes.shape[1]):
        total += _look_up(codebooks[level].to(wide), codes[:, level])
    return total


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
    """Move every codebook towards the mean of the vectors that chose its codes, in place."""
    N, K = x.shape[0], codebooks.shape[1]
    if N == 0:
        return
    _check_range(codes, codebooks)
    rows = torch.arange(N, device=x.device)
    residual = x.to(codebooks.dtype)
    for level in range(codes.shape[1]):
        level_codes = codes[:, level]
        book, size, total = codebooks[level], cluster_size[level], cluster_sum[level]
        chosen = _look_up(book, level_codes)

        has_code = level_codes >= 0
        bins = torch.where(has_code, level_codes, K)  # the bin past the last is thrown away
        counts = sum_rows_by_index(torch.ones_like(residual[:, :1]), bins, K + 1)[:K, 0]
        sums = sum_rows_by_index(residual, bins, K + 1)[:K]
        new_size = size * decay + counts * (1 - decay)
        new_total = total * decay + sums * (1 - decay)
        num_seen = new_size.sum()
        smoothed = (new_size + eps) / (num_seen + K * eps) * num_seen
        new_book = new_total / smoothed[:, None]

        # The j-th dead code takes the j-th row of a random order of the rows that have a code.
        words = random_words(seed, rows + level * N)
        order = torch.where(has_code, words, WORD + 1).argsort(stable=True)
        num_rows = has_code.sum()
        dead = new_size < dead_threshold
        turn = (dead.cumsum(0) - 1).clamp_min(0) % num_rows.clamp_min(1)
        fresh = residual[order[turn]]
        # A fresh code starts as if it had its fair share, so it has time to find its vectors.
        fair = (num_seen / K).clamp_min(dead_threshold)
        new_size = torch.where(dead, fair, new_size)
        new_total = torch.where(dead[:, None], fresh * fair, new_total)
        new_book = torch.where(dead[:, None], fresh, new_book)

        learns = num_rows > 0  # a level that no row reached stays as it is
        size.copy_(torch.where(learns, new_size, size))
        total.copy_(torch.where(learns, new_total, total))
        book.copy_(torch.where(learns, new_book, book))
        residual = residual - chosen


def _check_range(codes: Tensor, codebooks: Tensor) -> None:
    if codes.device.type != "cpu" or codes.numel() == 0:  # elsewhere the look would synchronise
        return
    lowest, highest = (int(code) for code in codes.aminmax())
    if lowest < -1 or highest >= codebooks.shape[1]:
        raise ValueError(f"codes span {lowest} to {highest}, wanted -1 to {codebooks.shape[1] - 1}")


def _encode_rows(residual: Tensor, books: Tensor) -> Tensor:
    """Codes [n, Q] of n vectors; both arguments in the precision to work in."""
    codes = []
    for book in books:
        norms = book.square().sum(1)
        # |r - c|^2 without |r|^2, which is the same for every code
        distances = torch.addmm(norms, residual, book.t(), alpha=-2)
        nearest = distances.argmin(1)
        if book.dtype == torch.float64:
            nearest = _lowest_tie(distances, residual, norms)
        codes.append(nearest)
        residual = residual - book[nearest]
    return torch.stack(codes, 1)


def _lowest_tie(distances: Tensor, residual: Tensor, norms: Tensor) -> Tensor:
    """The lowest index among the nearest: equal codes may differ in a product's last bit."""
    slack = TIE * (residual.square().sum(1) + norms.amax())
    limit = distances.amin(1) + slack
    return (distances <= limit[:, None]).to(torch.uint8).argmax(1)


def _look_up(book: Tensor, codes: Tensor) -> Tensor:
    return book[codes.clamp_min(0)].masked_fill((codes < 0)[:, None], 0.0)
