"""The codebooks of all levels in one tensor, the averages they follow, and how they start."""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from musiclm_engine.kmeans import residual_kmeans
from musiclm_engine.quantize.options import QuantizerOptions
from musiclm_engine.quantize.processes import (
    of_process_0,
    rows_of_all_processes,
    several_processes,
)
from musiclm_kernels import (
    rvq_apply_statistics,
    rvq_ema_update,
    rvq_encode,
    rvq_replacements,
    rvq_statistics,
)

MAX_ROWS = 2**32  # that all processes together may number
Batches = Tensor | Callable[[], Iterable[Tensor]]  # of a data set, from its start at each call
NAMES = ("initted", "cluster_size", "embed_avg", "embed")  # upstream's, of one codebook


class CodebookStack(nn.Module):
    """Q codebooks that follow moving averages of the vectors which choose their codes.

    They lie in one tensor, since an op walks all levels in one call: a module a level, as
    vector-quantize-pytorch has, would mean a copy into one tensor and back at every step. The state
    dict has that package's keys all the same, one set a level, with values that are views.

    The averages stay in float32 under `.half()` and `.bfloat16()`: a step of 1 % is lost there.

    Args:
        num_levels: Q.
        codebook_size: K.
        dim: D.
        options: decay, eps, dead codes, k-means, processes.
        key: of a level within the state dict, with {} for the level.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        num_levels: int,
        codebook_size: int,
        dim: int,
        options: QuantizerOptions,
        *,
        key: str,
    ) -> None:
        super().__init__()
        self.options = options
        self.key = key
        embed = torch.zeros(num_levels, codebook_size, dim)
        if not options.kmeans_init:
            for level in range(num_levels):  # each as a tensor of its own, as upstream draws them
                nn.init.kaiming_uniform_(embed[level : level + 1])
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("cluster_size", torch.ones(num_levels, codebook_size))
        self.register_buffer("initted", torch.full((num_levels,), not options.kmeans_init))
        # What `initted` says, where a look waits for no device and breaks no graph.
        self._is_known_initialised = not options.kmeans_init

    @property
    def is_initialised(self) -> bool:
        """Whether all levels hold codes."""
        if not self._is_known_initialised:
            self._is_known_initialised = bool(self.initted.all())
        return self._is_known_initialised

    @property
    def is_synced(self) -> bool:
        """Whether the codebooks follow the vectors of several processes."""
        return self.options.sync_codebook is not False and several_processes()

    @torch.no_grad()
    def initialise(self, rows: Tensor, counted: Tensor | None) -> bool:
        """Fit the levels that hold nothing yet to a batch; whether there were any.

        Codes that find no vector, as where there are fewer vectors than codes, stay zero and dead:
        vectors of later batches take their places.
        """
        if self.is_initialised:
            return False
        if counted is not None:
            rows = rows[counted]
        if self.is_synced and self.options.sync_kmeans:
            rows = rows_of_all_processes(rows)
        rows = rows[rows.isfinite().all(1)]  # as later, when such a vector counts nowhere
        if len(rows):
            Q, K, _ = self.embed.shape
            first = int(self.initted.long().cumprod(0).sum())  # the last may never have been met
            residual = rows - rvq_encode(rows, self.embed[:first])[1] if first else rows
            if len(rows) < K:
                codebooks = torch.zeros_like(self.embed[first:])
                codebooks[0, : len(rows)] = residual
            else:
                codebooks = residual_kmeans(
                    residual, Q - first, K, seed=0, iterations=self.options.kmeans_iters
                )
            self._start(codebooks, [rows])
        if self.is_synced:
            for name in NAMES:
                distributed.broadcast(getattr(self, name), src=0)
            self._is_known_initialised = bool(self.initted.all())
        return True

    @torch.no_grad()
    def fit(self, batches: Batches, *, seed: int, iterations: int) -> None:
        """Residual k-means over a data set of vectors [N, D]."""
        Q, K, _ = self.embed.shape
        codebooks = residual_kmeans(batches, Q, K, seed=seed, iterations=iterations)
        self._start(codebooks, [batches] if isinstance(batches, Tensor) else batches())

    def _start(self, codebooks: Tensor, batches: Iterable[Tensor]) -> None:
        """Begin with these codebooks as the last ones, and with the averages of a mean batch."""
        Q, num_batches = len(codebooks), 0
        self.embed[-Q:] = codebooks
        counts = torch.zeros_like(self.cluster_size)
        for rows in batches:
            codes, _ = rvq_encode(rows, self.embed, mode="fast")
            counts += rvq_statistics(rows, codes, self.embed, seed=0)[0]
            num_batches += 1
        sizes = counts[-Q:] / num_batches
        if self.options.dead_share is not None:
            # As a fresh code: one that begins with all of a small batch hardly follows its vectors
            # for 1 / (1 - decay) steps, while the encoder of a new codec runs away from it.
            sizes = (sizes > 0) * sizes.mean(1, keepdim=True)
        self.cluster_size[-Q:] = sizes
        self.embed_avg[-Q:] = self.embed[-Q:] * self.cluster_size[-Q:, :, None]
        self.initted.fill_(True)
        self._is_known_initialised = True

    @torch.no_grad()
    def follow(self, rows: Tensor, codes: Tensor, *, replace_dead: bool) -> None:
        """Move the codebooks by one step towards the vectors [N, D] that chose the codes [N, Q]."""
        threshold = self._dead_threshold(len(rows)) if replace_dead else 0.0
        # Drawn on the device, where no one waits for it.
        seed = torch.randint(2**62, (), device=rows.device)
        averages = (self.embed, self.cluster_size, self.embed_avg)
        if self.is_synced:
            # Numbers far apart, so that it does not matter how many rows another process has.
            seed = of_process_0(seed)
            rank, num_processes = distributed.get_rank(), distributed.get_world_size()
            first_row = rank * (MAX_ROWS // num_processes)
            counts, sums, draws = rvq_statistics(
                rows, codes, self.embed, seed=seed, first_row=first_row
            )
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
            distributed.all_reduce(draws, op=distributed.ReduceOp.MIN)
            replacements = rvq_replacements(
                rows, codes, self.embed, self.cluster_size, counts, draws,
                decay=self.options.decay, dead_threshold=threshold, first_row=first_row,
            )  # fmt: skip
            distributed.all_reduce(replacements)
            rvq_apply_statistics(
                *averages, counts, sums, replacements,
                decay=self.options.decay, dead_threshold=threshold, eps=self.options.eps,
            )  # fmt: skip
        else:
            rvq_ema_update(
                rows, codes, *averages,
                decay=self.options.decay, dead_threshold=threshold, seed=seed, eps=self.options.eps,
            )  # fmt: skip

    def _dead_threshold(self, num_rows: int) -> float:
        if self.options.dead_share is None:
            return self.options.threshold_ema_dead_code
        num_processes = distributed.get_world_size() if self.is_synced else 1
        return self.options.dead_share * num_rows * num_processes / self.embed.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrower = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrower else moved

        return super()._apply(keep_precision, recurse)

    def _slices(self) -> dict[str, Tensor]:
        """Views of the stack by upstream's keys, in its shapes."""
        return {
            self.key.format(level) + name: (
                self.initted[level] if name == "initted" else getattr(self, name)[level : level + 1]
            )
            for level in range(len(self.embed))
            for name in NAMES
        }

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for key, value in self._slices().items():
            destination[prefix + key] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.embed.is_meta:
            error_msgs.append(f"{prefix}: codebooks on the meta device, wanted to_empty() before")
            return
        wanted = {prefix + key: own for key, own in self._slices().items()}
        for key, own in wanted.items():
            if key not in state_dict:
                missing_keys += [key] if strict else []
            elif state_dict[key].shape not in (own.shape, (1,) if own.dtype == torch.bool else ()):
                error_msgs.append(
                    f"size mismatch for {key}: {tuple(state_dict[key].shape)} in the state dict, "
                    f"wanted {tuple(own.shape)}"
                )
            else:  # `initted` was [1.0] before it was true
                own.copy_(state_dict[key].view(own.shape))
        if strict:
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key not in wanted
            ]
        self._is_known_initialised = bool(self.initted.all())
