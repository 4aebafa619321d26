"""The contrastive losses of a joint embedding, in plain PyTorch.

Dimensions: L layers, B pairs, D width. Row i of audio belongs to row i of text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: float | Tensor,
    *,
    kind: str = "softmax",
    bias: float | Tensor | None = None,
) -> Tensor:
    """The loss of s = temperature * audio text^T, in at least fp32: [], or [L] of [L, B, D]."""
    _, scores = _products_and_scores(audio, text, temperature, bias)
    if kind == "sigmoid":
        return -F.logsigmoid(_signs(scores) * scores).sum((-2, -1)) / scores.shape[-1]
    own = scores.diagonal(dim1=-2, dim2=-1)
    rivals = _rivals(scores, kind)
    return ((rivals.logsumexp(-1) + rivals.logsumexp(-2)) / 2 - own).mean(-1)


def contrastive_statistics(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [L], slopes [2, L], and between them [4, L, count], or [0, L, count] for sigmoid: the
    log-sums of audio's and of text's rows, and of each sum the rivals' share. All follows from how
    much better than the own pair the rivals are, so that nothing cancels where they are not."""
    products, scores = _products_and_scores(audio, text, temperature, bias)
    (L, B, _), rows = scores.shape, slice(first, first + count)
    if kind == "sigmoid":
        signed = _signs(scores) * scores
        slope = (-_signs(scores) * torch.sigmoid(-signed))[:, rows]
        losses = -F.logsigmoid(signed)[:, rows].sum((1, 2)) / B
        slopes = torch.stack(((slope * products[:, rows]).sum((1, 2)), slope.sum((1, 2)))) / B
        return losses, scores.new_empty(0, L, count), slopes
    rivals = _rivals(scores, "decoupled")
    own, own_products = (x.diagonal(dim1=1, dim2=2) for x in (scores, products))
    ahead = torch.stack((rivals.logsumexp(2), rivals.logsumexp(1))) - own  # [2, L, B]
    shares = ahead.sigmoid() if kind == "softmax" else torch.ones_like(ahead)
    costs = F.softplus(ahead) if kind == "softmax" else ahead
    weights = torch.stack((rivals.softmax(2), rivals.softmax(1).mT)).nan_to_num()  # NaN: no rivals
    means = torch.stack(((weights[0] * products).sum(2), (weights[1] * products.mT).sum(2)))
    slope = (shares * (means - own_products))[:, :, rows].sum((0, 2)) / (2 * B)
    losses = costs[:, :, rows].sum((0, 2)) / (2 * B)
    log_sums = torch.cat((costs + own, shares))[:, :, rows]
    return losses, log_sums, torch.stack((slope, torch.zeros_like(slope)))


def contrastive_gradient(
    grad: Tensor,
    audio: Tensor,
    text: Tensor,
    log_sums: Tensor,
    temperature: Tensor,
    *,
    kind: str,
    bias: Tensor | None = None,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """[L, count, D] each, in the inputs' dtype: the whole loss by `count` rows of audio and text."""
    _, scores = _products_and_scores(audio, text, temperature, bias)
    B, rows = scores.shape[-1], slice(first, first + count)
    if kind == "sigmoid":
        signs = _signs(scores)
        by_scores = -signs * torch.sigmoid(-signs * scores) / B
    else:
        rivals = _rivals(scores, "decoupled")
        by_row = (rivals - log_sums[0][:, :, None]).exp()
        by_column = (rivals - log_sums[1][:, None, :]).exp()
        by_own = (log_sums[2] + log_sums[3]).diag_embed()  # all of a row's slopes add up to zero
        by_scores = (by_row + by_column - by_own) / (2 * B)
    by_products = (grad * temperature)[:, None, None] * by_scores
    grad_audio = by_products[:, rows] @ text.to(scores.dtype)
    grad_text = by_products[:, :, rows].mT @ audio.to(scores.dtype)
    return grad_audio.to(audio.dtype), grad_text.to(text.dtype)


def _products_and_scores(
    audio: Tensor, text: Tensor, temperature: float | Tensor, bias: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """[..., B, B]: the cosines where rows have unit length, and what the loss is made of."""
    wide = torch.promote_types(audio.dtype, torch.float32)
    products = audio.to(wide) @ text.to(wide).mT
    scores = _of_layer(temperature) * products
    return products, scores if bias is None else scores + _of_layer(bias)


def _of_layer(value: float | Tensor) -> float | Tensor:
    return value[..., None, None] if isinstance(value, Tensor) else value


def _signs(scores: Tensor) -> Tensor:
    """[B, B]: +1 for a pair that belongs together, -1 for every other."""
    return 2 * torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device) - 1


def _rivals(scores: Tensor, kind: str) -> Tensor:
    """The scores that stand in the denominators."""
    if kind == "softmax":
        return scores
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own, -torch.inf)
