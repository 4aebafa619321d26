"""The contrastive losses of a joint embedding, in plain PyTorch.

Dimensions: B pairs, D width. Row i of audio belongs to row i of text.
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
    """The loss of s = temperature * audio text^T, in at least fp32."""
    wide = torch.promote_types(audio.dtype, torch.float32)
    scores = temperature * (audio.to(wide) @ text.to(wide).mT)
    if kind == "sigmoid":
        scores = scores if bias is None else scores + bias
        return -F.logsigmoid(_signs(scores) * scores).sum() / len(scores)
    rivals = _without_diagonal(scores) if kind == "decoupled" else scores
    to_text = rivals.logsumexp(1) - scores.diagonal()
    to_audio = rivals.logsumexp(0) - scores.diagonal()
    return (to_text.mean() + to_audio.mean()) / 2


def contrastive_loss_backward(
    grad: Tensor, audio: Tensor, text: Tensor, temperature: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of audio, text, temperature and bias (zero where the bias is not read)."""
    wide = torch.promote_types(audio.dtype, torch.float32)
    wide_audio, wide_text = audio.to(wide), text.to(wide)
    products = wide_audio @ wide_text.mT
    grad_scores = _score_gradient(temperature * products, bias, kind) * grad
    grad_products = temperature * grad_scores
    return (
        (grad_products @ wide_text).to(audio.dtype),
        (grad_products.mT @ wide_audio).to(text.dtype),
        (grad_scores * products).sum().to(temperature.dtype),
        grad_scores.sum().to(temperature.dtype if bias is None else bias.dtype),
    )


def _score_gradient(scores: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """[B, B]: the derivative of the loss by each score."""
    B = len(scores)
    if kind == "sigmoid":
        scores = scores if bias is None else scores + bias
        signs = _signs(scores)
        return -signs * torch.sigmoid(-signs * scores) / B
    rivals = _without_diagonal(scores) if kind == "decoupled" else scores
    identity = torch.eye(B, dtype=scores.dtype, device=scores.device)
    return (rivals.softmax(1) + rivals.softmax(0) - 2 * identity) / (2 * B)


def _signs(scores: Tensor) -> Tensor:
    """+1 for a pair that belongs together, -1 for every other."""
    return 2 * torch.eye(len(scores), dtype=scores.dtype, device=scores.device) - 1


def _without_diagonal(scores: Tensor) -> Tensor:
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return scores.masked_fill(own, -torch.inf)
