"""Batches larger than memory: embeddings a chunk at a time, computed again for the gradients."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def embed_in_chunks(
    embed: Callable[..., Tensor], rows: tuple[Tensor | None, ...], chunk_size: int
) -> Tensor:
    """embed(*rows) with no more than `chunk_size` rows' activations alive at a time.

    Each chunk passes through `embed` twice: now, keeping nothing but its embeddings, and during
    backward, when the loss's gradient by them is known. Between the two stands the loss over all
    rows, so its negatives are the whole batch (gradient caching, Gao et al., arXiv 2101.06983). The
    second pass draws the same random numbers, on the CPU and on the device, and runs under the
    autocast of the first. Gradients are those of one pass over all rows, up to rounding and to
    what is drawn for each pass; nothing else of the training step changes, several processes
    included: gradients reach a parameter once.

    Args:
        embed: (n, ...) of each of `rows` -> (n, ...), row by row.
        rows: (B, ...) tensors, or None where there is none.
        chunk_size: rows of a pass.

    Returns:
        (B, ...).

    Raises:
        ValueError: a chunk size below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; want at least 1")
    num_rows = next(len(x) for x in rows if x is not None)
    embeddings = []
    for start in range(0, num_rows, chunk_size):
        chunk = [None if x is None else x[start : start + chunk_size] for x in rows]
        embeddings.append(checkpoint(embed, *chunk, use_reentrant=False))
    return torch.cat(embeddings)
