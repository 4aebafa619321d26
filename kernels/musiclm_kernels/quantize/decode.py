"""The sum of the codes that vectors were quantised to, in Triton: one launch, a program for a tile of
the result, which stays in registers until all levels are added.

Dimensions: N vectors, Q levels, K codes a level, D width. Memory-bound: 4 N D bytes are written and
8 N Q of codes read; the rows of the codebooks come out of the second-level cache, e N Q D bytes of
them, e an element's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048  # 16 a thread: four loads of 16 bytes in flight for each level in fp32
MAX_COLUMNS = 512  # of a tile


@triton.jit
def _decode_kernel(
    codes_ptr,  # [N, Q] int32 or int64, strided
    codebooks_ptr,  # [at least Q, K, D]
    out_ptr,  # [N, D]
    N,
    K,
    stride_n,
    stride_q,
    Q: tl.constexpr,  # so that all levels' loads can be under way at once
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    out_type = out_ptr.dtype.element_ty

    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=out_type)
    for level in tl.static_range(Q):
        code = tl.load(codes_ptr + rows * stride_n + level * stride_q, mask=rows < N, other=-1)
        has_code = (code >= 0) & (code < K)
        offsets = (level * tl.cast(K, tl.int64) + code)[:, None] * D + columns[None, :]
        row = tl.load(codebooks_ptr + offsets, mask=mask & has_code[:, None], other=0.0)
        total += row.to(out_type)
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], total, mask=mask)


def rvq_decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The op's body on CUDA."""
    (N, Q), (_, K, D) = codes.shape, codebooks.shape
    out = torch.empty((N, D), dtype=torch.float32, device=codes.device)
    BLOCK_D = min(triton.next_power_of_2(max(D, 1)), MAX_COLUMNS)
    BLOCK_N = max(1, TILE_ELEMENTS // BLOCK_D)
    if out.numel():
        _decode_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(D, BLOCK_D))](
            codes, codebooks.contiguous(), out, N, K, *codes.stride(),
            Q=Q, D=D, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return out
