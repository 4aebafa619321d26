"""Residual vector quantisation in plain PyTorch.

Dimensions: N vectors, Q levels, K codes a level, D width. Code -1 means that a vector has no code
at that level (quantiser dropout): it adds nothing there.
"""

import torch
from torch import Tensor

CHUNK_ROWS = 2048  # the distances of so many vectors to 1024 codes are 16 MB
TIE = 1e-13  # relative: two float64 distances closer than this are one distance


def rvq_encode(x: Tensor, codebooks: Tensor, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    """Level after level, the nearest code to what the levels before left over.

    "exact" runs in float64 throughout. "fast" runs in fp32 (float64 for float64 inputs), where a
    kernel may round the factors of the product to fp16: its codes may differ in near-ties.
    """
    wide = torch.promote_types(x.dtype, torch.promote_types(codebooks.dtype, torch.float32))
    work = torch.float64 if mode == "exact" else wide
    books = codebooks.to(work)
    codes = torch.cat([_encode_rows(rows.to(work), books) for rows in x.split(CHUNK_ROWS)])
    return codes, rvq_decode(codes, codebooks.to(wide))


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum over levels of codebooks[q, codes[:, q]], in at least fp32."""
    check_range(codes, codebooks)
    wide = torch.promote_types(codebooks.dtype, torch.float32)
    total = torch.zeros(codes.shape[0], codebooks.shape[2], dtype=wide, device=codes.device)
    for level in range(codes.shape[1]):
        total += look_up(codebooks[level].to(wide), codes[:, level])
    return total


def check_range(codes: Tensor, codebooks: Tensor) -> None:
    if codes.device.type != "cpu" or codes.numel() == 0:  # elsewhere the look would synchronise
        return
    lowest, highest = (int(code) for code in codes.aminmax())
    if lowest < -1 or highest >= codebooks.shape[1]:
        raise ValueError(f"codes span {lowest} to {highest}, wanted -1 to {codebooks.shape[1] - 1}")


def nearest(residual: Tensor, book: Tensor) -> Tensor:
    """[n] the codes nearest to n vectors; both arguments in the precision to work in."""
    norms = book.square().sum(1)
    # |r - c|^2 without |r|^2, which is the same for every code
    distances = torch.addmm(norms, residual, book.t(), alpha=-2)
    if book.dtype != torch.float64:
        return distances.argmin(1)
    # The lowest index among the nearest: equal codes may differ in a product's last bit.
    slack = TIE * (residual.square().sum(1) + norms.amax())
    limit = distances.amin(1) + slack
    return (distances <= limit[:, None]).to(torch.uint8).argmax(1)


def _encode_rows(residual: Tensor, books: Tensor) -> Tensor:
    codes = []
    for book in books:
        codes.append(nearest(residual, book))
        residual = residual - book[codes[-1]]
    return torch.stack(codes, 1)


def look_up(book: Tensor, codes: Tensor) -> Tensor:
    return book[codes.clamp_min(0)].masked_fill((codes < 0)[:, None], 0.0)
