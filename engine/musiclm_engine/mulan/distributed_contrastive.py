"""The contrastive loss of a batch whose pairs are spread over processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from musiclm_kernels import contrastive_gradient, contrastive_statistics


def is_distributed() -> bool:
    """Whether there are other processes now; asked at each step, not when a model is built."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def distributed_contrastive_loss(
    audio: Tensor,
    text: Tensor,
    temperature: Tensor,
    *,
    kind: str = "softmax",
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This process's share of the loss over the pairs of all processes.

    The mean of the shares over processes is the loss; the mean of the gradients, which is what
    DistributedDataParallel takes, is its gradient: each process computes the exact gradient of its
    own rows, times the number of processes. Embeddings are gathered once, and a number for each row
    and side; no gradient is sent, and the work of a process is its share of B^2. Processes may hold
    different numbers of pairs, one at least; their sizes are exchanged, which waits for the device.

    Args:
        audio, text: (b, D) of this process, or (L, b, D), a loss for each of L layers; the same
            L, D and dtype in all.
        temperature, bias: of no dimensions or, with layers, (L,); equal in all processes.
        kind: as in `contrastive_loss`.
        group: the processes; None is all.

    Returns:
        A tensor of no dimensions, or (L,).

    Raises:
        ValueError: as `contrastive_loss`.
    """
    if audio.dim() not in (2, 3) or text.shape != audio.shape:
        raise ValueError(
            f"audio has shape {tuple(audio.shape)}, text has shape {tuple(text.shape)}; "
            "want the same (b, D) or (L, b, D)"
        )
    if audio.dim() == 2:
        scalars = (temperature.reshape(1), None if bias is None else bias.reshape(1))
        return _Loss.apply(audio[None], text[None], *scalars, kind, group).squeeze(0)
    num_layers = len(audio)
    bias = None if bias is None else bias.expand(num_layers)
    return _Loss.apply(audio, text, temperature.expand(num_layers), bias, kind, group)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        audio: Tensor,
        text: Tensor,
        temperature: Tensor,
        bias: Tensor | None,
        kind: str,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        own = torch.tensor([audio.shape[1]], device=audio.device)
        sizes = torch.cat(_gather(own, group)).tolist()
        rank = dist.get_rank(group)
        ctx.kind, ctx.num_processes = kind, len(sizes)
        ctx.first, ctx.count = sum(sizes[:rank]), sizes[rank]
        parts = _gather_unequal(torch.stack((audio, text)).permute(2, 0, 1, 3), sizes, group)
        all_audio, all_text = parts.permute(1, 2, 0, 3).contiguous()  # [L, B, D] each
        losses, log_sums, slopes = contrastive_statistics(
            all_audio, all_text, temperature,
            kind=kind, bias=bias, first=ctx.first, count=ctx.count,
        )  # fmt: skip
        all_log_sums = log_sums.new_empty(0, len(audio), sum(sizes))
        if kind != "sigmoid":
            of_rows = _gather_unequal(log_sums.permute(2, 0, 1).contiguous(), sizes, group)
            all_log_sums = of_rows.permute(1, 2, 0).contiguous()
        ctx.save_for_backward(all_audio, all_text, all_log_sums, temperature, bias, slopes)
        return losses * ctx.num_processes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        audio, text, log_sums, temperature, bias, slopes = ctx.saved_tensors
        grad = grad * ctx.num_processes
        grad_audio, grad_text = contrastive_gradient(
            grad, audio, text, log_sums, temperature,
            kind=ctx.kind, bias=bias, first=ctx.first, count=ctx.count,
        )  # fmt: skip
        by_temperature = (grad * slopes[0]).to(temperature.dtype)
        by_bias = None if bias is None else (grad * slopes[1]).to(bias.dtype)
        return grad_audio, grad_text, by_temperature, by_bias, None, None


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def _gather_unequal(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes, in their order; those of a shorter one are filled up on the way."""
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = _gather(padded, group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
