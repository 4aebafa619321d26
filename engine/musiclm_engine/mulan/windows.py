"""Long audio as overlapping windows."""

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_WINDOWS = 64  # a forward pass: bounds memory for long audio


def num_windows(lengths: list[int], window_samples: int, stride_samples: int) -> list[int]:
    """Windows that fit into each clip; a clip shorter than a window is one window."""
    return [1 + max(0, length - window_samples) // stride_samples for length in lengths]


def window_batches(
    audio: Tensor, lengths: list[int], window_samples: int, stride_samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts audio (B, time) into windows, row after row: ((n, window), lengths (n,)), n <= 64."""
    spans = [
        (row, index * stride_samples, min(length, window_samples))
        for row, (length, count) in enumerate(
            zip(lengths, num_windows(lengths, window_samples, stride_samples), strict=True)
        )
        for index in range(count)
    ]
    for first in range(0, len(spans), MAX_WINDOWS):
        batch = spans[first : first + MAX_WINDOWS]
        windows = torch.stack(
            [audio[row, start : start + window_samples] for row, start, _ in batch]
        )
        yield windows, torch.tensor([held for _, _, held in batch], device=audio.device)
