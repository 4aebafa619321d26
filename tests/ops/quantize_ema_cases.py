"""What the tests of the codebooks' training share."""

from contextlib import nullcontext

import pytest
import torch

from musiclm_kernels import rvq_ema_update, rvq_encode
from musiclm_kernels.testing import through_kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NOBODY = 2**63 - 1


def running_kernels():
    """On a GPU the ops run their kernels as it is; without one, in Triton's interpreter."""
    if GPU:
        return nullcontext()
    pytest.importorskip("triton")
    return through_kernels()


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(N=40, Q=3, K=12, D=5, q=None, dtype=torch.float64, x_dtype=None, seed=0):
    """x, codes and codebooks; the codes are the nearest, but -1 here and there."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    codebooks = torch.randn(Q, K, D, generator=generator, dtype=torch.float64)
    codebooks /= torch.arange(1, Q + 1)[:, None, None]
    codes, _ = rvq_encode(x, codebooks[:q])
    codes[torch.rand(codes.shape, generator=generator) < 0.1] = -1
    return x.to(x_dtype or dtype).to(DEVICE), codes.to(DEVICE), codebooks.to(dtype).to(DEVICE)


def averages(codebooks, seed=1):
    """cluster_size and cluster_sum: some codes are near dead, some are not."""
    generator = torch.Generator().manual_seed(seed)
    size = 4 * torch.rand(codebooks.shape[:2], generator=generator, dtype=torch.float64)
    size = size.to(codebooks)
    return size, codebooks * size[..., None]


def update(x, codes, codebooks, *, seed, decay=0.9, dead_threshold=2.0):
    """Codebooks and averages after one step."""
    state = [y.clone() for y in (codebooks, *averages(codebooks))]
    rvq_ema_update(x, codes, *state, decay=decay, dead_threshold=dead_threshold, seed=seed)
    return state
