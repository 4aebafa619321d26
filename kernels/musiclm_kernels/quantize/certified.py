"""The definition of residual quantisation on a CPU, at the speed of fp32: the body there.

Distances are computed in fp32, each with a bound on its rounding. Where a level's nearest code is
nearer than every other by more than the bounds leave open, it is the float64 definition's. The few
vectors where it is not are searched again in float64. No tensor of N * K distances exists.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from musiclm_kernels.quantize import reference

CHUNK_DISTANCES = 2**20  # 4 MB in fp32
CLASSES = (
    32  # codes k, k + 32, k + 64, ... compete first; the smallest distances of 32 classes then
)
ROUNDING = 2.0**-24  # of fp32, relative
UNDERFLOW = 2.0**-120  # more than what flushing of small numbers takes from any sum below
LARGEST = 1e38  # sums of this magnitude cannot overflow fp32 on the way


def rvq_encode(x: Tensor, codebooks: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """`reference.rvq_encode`: in "exact" mode the same codes, always."""
    if torch.float64 in (x.dtype, codebooks.dtype):
        return reference.rvq_encode(x, codebooks, mode=mode)
    exact = mode == "exact"
    books = codebooks.float()
    residual = x.to(torch.float32, copy=True)
    quantized = torch.zeros_like(residual)
    drift = torch.zeros(len(x), dtype=torch.float64)  # of the residual from the definition's
    codes = torch.empty(len(x), len(books), dtype=torch.int64)
    for level, book in enumerate(books):
        lengths = residual.norm(dim=1).double()
        drift += ROUNDING * lengths + UNDERFLOW
        margin = _margin(lengths, drift, book) if exact else torch.zeros_like(drift)
        nearest, sure = _search(residual, book, margin.float())
        unsure = sure.logical_not().nonzero()[:, 0]
        for rows in unsure.split(reference.CHUNK_ROWS) if len(unsure) else ():
            left = residual[rows]
            if exact:
                left = x[rows].double()
                for earlier in range(level):
                    left -= books[earlier][codes[rows, earlier]].double()
            nearest[rows] = reference.nearest(left, book.to(left.dtype))
        codes[:, level] = nearest
        chosen = book.index_select(0, nearest)
        residual -= chosen
        quantized += chosen
    return codes, quantized


def _margin(lengths: Tensor, drift: Tensor, book: Tensor) -> Tensor:
    """[N] float64: two codes of which one has a distance larger than the other's by more than this
    are in that order for the definition too, which takes distances within its own slack for equal.

    A distance |c|^2 - 2 r.c is a sum of D + 1 terms and its rounding in any order less than D + 2
    units of |c|^2 + 2 |r| |c|. The rest up to D + 16 is for the roundings of |c|^2, of the lengths,
    and of the margin itself.
    """
    longest = book.double().norm(dim=1).amax()
    size = longest * (longest + 2 * lengths)
    rounding = (book.shape[1] + 16) * (ROUNDING * size + UNDERFLOW) + 2 * longest * drift
    slack = reference.TIE * (lengths + longest).square()
    return torch.where(size < LARGEST, 2 * (rounding + slack), torch.inf)


def _search(residual: Tensor, book: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """[N] the nearest codes by fp32, and whether no other code comes within the margin of them."""
    K = len(book)
    padding = -K % CLASSES
    norms = pad(book.double().square().sum(1).float(), (0, padding), value=torch.inf)
    factors = pad(-2 * book, (0, 0, 0, padding)).t()
    nearest = torch.empty(len(residual), dtype=torch.int64)
    sure = torch.empty(len(residual), dtype=torch.bool)
    step = max(CLASSES, CHUNK_DISTANCES // len(norms))
    buffer = residual.new_empty(min(step, len(residual)), len(norms))
    for start in range(0, len(residual), step):
        rows = slice(start, min(start + step, len(residual)))
        distances = buffer[: rows.stop - start]
        torch.addmm(norms, residual[rows], factors, out=distances)
        by_class = distances.view(len(distances), -1, CLASSES)
        smallest = by_class.amin(1)
        limit = smallest.amin(1, keepdim=True) + margin[rows, None]
        in_reach = smallest <= limit
        which = in_reach.to(torch.uint8).argmax(1)
        members = by_class.gather(2, which[:, None, None].expand(-1, by_class.shape[1], 1))[..., 0]
        member_in_reach = members <= limit
        nearest[rows] = member_in_reach.to(torch.uint8).argmax(1) * CLASSES + which
        sure[rows] = (in_reach.sum(1) == 1) & (member_in_reach.sum(1) == 1)
    return nearest.clamp_(max=K - 1), sure
