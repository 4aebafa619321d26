"""The contrastive losses a block of rows at a time: the body on a CPU.

No tensor of B * B elements exists, and a block's scores stay in the processor's cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 2**17  # half a megabyte in float32, of which a block takes three or four
LINEAR = 50  # beyond it, softplus(x) is x in float64 too; its own exponential overflows near 88
MIN_ROWS = 8  # below it, the matrix products of a block are too thin


def contrastive_statistics(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.contrastive_statistics`."""
    wide = torch.promote_types(audio.dtype, torch.float32)
    (L, B, _), sides = audio.shape, 1 if kind == "sigmoid" else 2
    log_sums = torch.empty(4 if sides == 2 else 0, L, count, dtype=wide, device=audio.device)
    sums = torch.zeros(3, L, dtype=wide, device=audio.device)  # of the loss, its slopes
    for layer in range(L):
        of_audio, of_text = audio[layer].to(wide), text[layer].to(wide)
        for side in range(sides):
            own, other = (of_audio, of_text) if side == 0 else (of_text, of_audio)
            for rows in _blocks(first, count, B):
                products = own[rows] @ other.mT
                if sides == 1:
                    terms = _sigmoid_terms(products, rows.start, temperature[layer], bias, layer)
                else:
                    of_rows, terms = _softmax_terms(
                        products, rows.start, temperature[layer], kind == "decoupled"
                    )
                    log_sums[side::2, layer, rows.start - first : rows.stop - first] = of_rows
                sums[:, layer] += torch.stack([term.sum() for term in terms]) / (sides * B)
    return sums[0].clone(), log_sums, sums[1:].clone()


def _softmax_terms(
    products: Tensor, start: int, temperature: Tensor, decoupled: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Each row's log-sum and the rivals' share of the sum [2, rows]; what the row adds to the loss
    and to its slopes in temperature and bias."""
    own = products.diagonal(start).clone()
    weights = products * temperature
    weights.diagonal(start).fill_(-torch.inf)
    highest = weights.amax(1).clamp_min_(torch.finfo(weights.dtype).min)  # of no rivals: -inf
    weights.sub_(highest[:, None]).exp_()
    total = weights.sum(1)
    mean = torch.linalg.vecdot(weights, products) / total.clamp_min(torch.finfo(total.dtype).tiny)
    ahead = highest + total.log() - temperature * own
    cost = ahead if decoupled else F.softplus(ahead, threshold=LINEAR)
    share = torch.ones_like(ahead) if decoupled else ahead.sigmoid()
    of_rows = torch.stack((cost + temperature * own, share))
    return of_rows, (cost, share * (mean - own), torch.zeros_like(own))


def _sigmoid_terms(
    products: Tensor, start: int, temperature: Tensor, bias: Tensor | None, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What each row adds to the loss and to its slopes in temperature and bias."""
    scores = _sigmoid_scores(products, temperature, bias, layer)
    scores.diagonal(start).neg_()
    losses = F.softplus(scores, threshold=LINEAR)
    slopes = scores.sigmoid_()
    slopes.diagonal(start).neg_()
    return losses, torch.linalg.vecdot(slopes, products), slopes


def _sigmoid_scores(
    products: Tensor, temperature: Tensor, bias: Tensor | None, layer: int
) -> Tensor:
    scores = products * temperature
    return scores if bias is None else scores.add_(bias[layer])


def contrastive_gradient(
    grad: Tensor,
    audio: Tensor,
    text: Tensor,
    log_sums: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    kind: str,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """`reference.contrastive_gradient`."""
    wide = torch.promote_types(audio.dtype, torch.float32)
    (L, B, D) = audio.shape
    grads = tuple(torch.empty(L, count, D, dtype=x.dtype, device=x.device) for x in (audio, text))
    for layer in range(L):
        of_audio, of_text = audio[layer].to(wide), text[layer].to(wide)
        for side in range(2):
            own, other = (of_audio, of_text) if side == 0 else (of_text, of_audio)
            for rows in _blocks(first, count, B):
                products = own[rows] @ other.mT
                if kind == "sigmoid":
                    scores = _sigmoid_scores(products, temperature[layer], bias, layer)
                    scores.diagonal(rows.start).neg_()
                    by_scores = scores.sigmoid_()
                    by_scores.diagonal(rows.start).neg_()
                    scale = grad[layer] * temperature[layer] / B
                else:
                    scores = products.mul_(temperature[layer])
                    by_scores = (scores - log_sums[side, layer, rows, None]).exp_()
                    by_scores += scores.sub_(log_sums[1 - side, layer]).exp_()
                    by_own = -log_sums[2:, layer, rows].sum(0)  # all of a row's slopes sum to 0
                    by_scores.diagonal(rows.start).copy_(by_own)
                    scale = grad[layer] * temperature[layer] / (2 * B)
                target = grads[side][layer, rows.start - first : rows.stop - first]
                target.copy_((by_scores @ other).mul_(scale))
    return grads[0], grads[1]


def _blocks(first: int, count: int, B: int) -> Iterator[slice]:
    """The rows first to first + count, as many at a time as have `BLOCK_SCORES` scores."""
    step = max(MIN_ROWS, BLOCK_SCORES // max(B, 1))
    for start in range(first, first + count, step):
        yield slice(start, min(start + step, first + count))
