"""One attention problem as its kernels take it: pointers, sizes and strides; and the block sizes."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from musiclm_kernels.attention.reference import dropout_threshold

MAX_HEAD_WIDTH = 128  # BLOCK_D: a block of queries must fit the registers of one program
MAX_GATHERED = 16384  # table entries that a program can hold without spilling; more stay in memory


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: queries and keys of a tile, and Triton's launch options."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Problem:
    """The arguments that every attention kernel begins with, in their order."""

    B: int
    H: int
    N: int
    M: int
    D: int
    T: int
    num_key_heads: int
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor | None
    q_codes: Tensor | None
    k_codes: Tensor | None
    key_mask: Tensor | None
    dropout_seed: Tensor | None
    offset: int
    causal: bool
    scale: float
    dropout: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor | None,
        q_codes: Tensor | None,
        k_codes: Tensor | None,
        offset: int,
        causal: bool,
        key_mask: Tensor | None,
        scale: float,
        dropout: float,
        dropout_seed: Tensor | None,
    ) -> "Problem":
        B, H, N, D = q.shape
        num_key_heads, M = k.shape[1], k.shape[2]
        if D > MAX_HEAD_WIDTH:
            raise ValueError(f"q has width {D}, wanted at most {MAX_HEAD_WIDTH} on CUDA")
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        table, q_codes, k_codes, key_mask = (
            None if x is None else x.contiguous() for x in (table, q_codes, k_codes, key_mask)
        )
        T = 1 if table is None else table.shape[1]
        return cls(
            B, H, N, M, D, T, num_key_heads, q.dtype, q, k, v, table, q_codes, k_codes, key_mask,
            dropout_seed, offset, causal, scale, dropout,
        )  # fmt: skip

    @property
    def arch(self) -> int:
        """Compute capability times ten; Hopper's in the interpreter, which has none."""
        if self.q.device.type == "cpu":
            return 90
        return triton.runtime.driver.active.get_current_target().arch

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        bias = (self.table, self.q_codes, self.k_codes)
        return (self.q, self.k, self.v, *bias, self.key_mask, self.dropout_seed)

    @property
    def sizes(self) -> tuple[float, ...]:
        """Up to `keep_scale`."""
        counts = (self.offset, self.H, self.N, self.M, self.T)
        return (*counts, self.scale, dropout_threshold(self.dropout), 1 / (1 - self.dropout))

    @property
    def strides(self) -> tuple[int, ...]:
        codes = (
            0 if codes is None or len(codes) == 1 else codes.shape[1]
            for codes in (self.q_codes, self.k_codes)
        )
        return (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *codes)

    @property
    def gathers(self) -> bool:
        """Whether programs hold the table, and pick entries from it in registers."""
        return self.table is not None and self.T <= MAX_GATHERED

    @property
    def constants(self) -> dict[str, Any]:
        exact = self.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
        return {
            "GROUP": self.H // self.num_key_heads,
            "D": self.D,
            "BLOCK_D": max(16, triton.next_power_of_2(self.D)),
            "BLOCK_T": max(16, triton.next_power_of_2(self.T)) if self.gathers else 0,
            "CAUSAL": self.causal,
            "PRECISION": "ieee" if exact else "tf32",
        }


# Chosen from what Triton 3.6 makes of them (docs/kernels/attention.md), so that nothing spills; not
# yet timed.


def forward_config(problem: Problem, bounded: bool) -> Config:
    narrow, arch = problem.D <= 64, problem.arch
    if problem.dtype == torch.float32:
        return _cut(problem, 32, 32 if narrow or arch == 90 else 16, 8, 2)
    if arch < 90:
        if narrow and problem.T > 2048:
            return _cut(problem, 64, 32, 4 if problem.T <= 8192 else 8, 2)
        return _cut(problem, 128, 32, 4 if narrow else 8, 2)
    if arch >= 100 and bounded:
        return _cut(problem, 64, 64, 8, 2)
    if arch >= 100 and (narrow or problem.dropout_seed is not None):
        return _cut(problem, 128, 32, 8, 2)
    wide_keys = arch == 90 and narrow and problem.T <= 8192 and problem.dropout_seed is None
    return _cut(problem, 128, 128 if wide_keys else 64, 8, 2)


def keys_config(problem: Problem) -> Config:
    """Of the pass that owns keys and walks over queries."""
    if problem.dtype == torch.float32:
        return _cut(problem, 32, 32, 8, 2)
    light = problem.D <= 64 and problem.dropout_seed is None
    if problem.arch < 90:
        if light and problem.T <= 4096 and problem.key_mask is None:
            return _cut(problem, 32, 128, 8, 2)
        return _cut(problem, 32, 32, 4, 2)
    if light and problem.T <= 8192 and not problem.causal:
        return _cut(problem, 64, 128, 8, 3 if problem.arch == 90 else 2)
    if problem.arch == 90 and problem.D > 64:
        return _cut(problem, 32, 32 if problem.dropout_seed is not None else 128, 8, 3)
    return _cut(problem, 32, 128, 8, 2)


def queries_config(problem: Problem) -> Config:
    """Of the pass that owns queries and walks over keys."""
    if problem.dtype == torch.float32:
        return _cut(problem, 32, 32, 8, 2)
    if problem.arch < 90:
        return _cut(problem, 128, 32, 8, 2) if problem.D <= 64 else _cut(problem, 64, 64, 8, 2)
    in_memory = problem.table is not None and not problem.gathers
    dropping = problem.arch >= 100 and problem.dropout_seed is not None
    return _cut(problem, 128, 32 if in_memory or dropping else 64, 8, 2)


def _cut(problem: Problem, block_q: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    # A pipelined loop would stage each entry that it reads from memory through shared memory.
    stages = 1 if problem.table is not None and not problem.gathers else num_stages
    return Config(block_q, block_k, num_warps, stages)
