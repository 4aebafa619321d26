"""What the processes of torch.distributed tell each other of their vectors."""

import torch
from torch import Tensor, distributed


def several_processes() -> bool:
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def of_process_0(value: Tensor) -> Tensor:
    """Process 0's value in each process."""
    shared = value if distributed.get_rank() == 0 else torch.zeros_like(value)
    distributed.all_reduce(shared)
    return shared


def rows_of_all_processes(rows: Tensor) -> Tensor:
    """Rows [N, D] of each process, N its own, one process after another. Waits for the device."""
    num_processes = distributed.get_world_size()
    sizes = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(num_processes)]
    distributed.all_gather(sizes, torch.tensor(len(rows), device=rows.device))
    lengths = [int(size) for size in sizes]
    padded = rows.new_zeros(max(lengths), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
