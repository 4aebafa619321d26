"""A whole step through the Triton kernels, in Triton's interpreter: small and slow."""

import pytest
import torch

from musiclm_engine.audiolm import CoarseTransformer
from musiclm_engine.generation import DecodeStep, Sampling, decoder_from_stage, derive_seeds
from musiclm_kernels.testing import through_kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")


@pytest.fixture(scope="module")
def stage(with_opinions):
    torch.manual_seed(1)
    return with_opinions(
        CoarseTransformer(
            num_semantic_tokens=12, codebook_size=10, num_coarse_quantizers=2,
            conditioning_size=8, conditioning_length=2, dim=32, depth=1, heads=2, dim_head=16,
            max_frames=8, ff_gated=True,
        )
    ).eval()  # fmt: skip


def begun(stage, weight_dtype, sampling):
    conditioning = torch.tensor([[1, 2], [8, 8]])  # a row and its twin
    context = torch.tensor([[[3], [5]]]).expand(2, -1, -1)
    step = DecodeStep(
        decoder_from_stage(stage, weight_dtype=weight_dtype), rows=1,
        length=stage.sequence_length(2, 2), sampling=sampling,
    )  # fmt: skip
    with torch.inference_mode():
        prefix = torch.zeros(2, 0, 2, dtype=torch.int64)
        x = stage.prefill(conditioning, context, prefix, step.cache.append)
        query_codes, key_codes = stage.codes(2, 2)
    step.begin(
        x, seeds=derive_seeds(0, count=1), position=stage.sequence_length(2, 0) - 1,
        query_codes=query_codes, key_codes=key_codes,
    )  # fmt: skip
    return step


@pytest.mark.parametrize(
    "weight_dtype, sampling",
    [
        (None, Sampling(top_k=8, top_p=0.9, guidance=2.0)),
        (torch.int8, Sampling(top_k=1, guidance=2.0)),  # a draw may turn on the rounding
    ],
)
def test_the_kernels_make_the_step_that_the_definitions_make(stage, weight_dtype, sampling):
    wanted, found = (begun(stage, weight_dtype, sampling) for _ in range(2))
    for _ in range(2):
        token = wanted()
        with through_kernels():
            assert torch.equal(found(), token)
    for kept, other in zip(wanted.cache.layers[0][:2], found.cache.layers[0][:2], strict=True):
        kept, other = kept[:, :, :6], other[:, :, :6]  # conditioning, context; start and one token
        # On a CPU activations are rounded to bfloat16 beside weights of 8 bits.
        rounding = 1e-5 if weight_dtype is None else 2**-7
        torch.testing.assert_close(other, kept, rtol=0, atol=rounding * float(kept.abs().max()))
    assert not found.buffers.counters.any()
