"""The codec's quantiser: codes, straight-through gradients, codebooks that move in training."""

import pytest
import torch

from musiclm_engine.codec import ResidualVQ


def vectors(seed=0, batch=3, frames=50):
    return torch.randn(batch, frames, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rq():
    torch.manual_seed(0)
    rq = ResidualVQ(8, num_quantizers=3, codebook_size=16, quantizer_dropout=0.0)
    rq.train()(vectors())
    return rq.eval()


def test_gradient_passes_straight_through(rq):
    for mode in (rq.train(), rq.eval()):
        x = vectors(1).requires_grad_()
        quantized, _, commitment = mode(x)
        downstream = torch.randn(x.shape)
        (quantized * downstream).sum().backward()
        assert torch.equal(x.grad, downstream)
        x.grad = None
        # Of the commitment only x has a gradient, towards its codes.
        quantized, _, commitment = mode(x)
        commitment.backward()
        torch.testing.assert_close(x.grad, 2 * (x - quantized).detach() / x.numel())


def test_quantized_is_the_sum_of_the_codes(rq):
    x = vectors(1)
    quantized, codes, commitment = rq(x)
    assert torch.equal(codes, rq.encode(x))
    torch.testing.assert_close(quantized, rq.decode(codes))
    torch.testing.assert_close(commitment, (x - quantized).square().mean())
    slow = sum(rq.codebooks[q][codes[:, :, q]] for q in range(3))
    torch.testing.assert_close(rq.decode(codes), slow)


def test_each_level_brings_the_sum_closer(rq):
    x = vectors()
    codes = rq.encode(x)
    errors = [(x - rq.decode(codes[:, :, :q])).square().mean().item() for q in (1, 2, 3)]
    assert x.square().mean() > errors[0] > errors[1] > errors[2]


def test_first_batch_initialises():
    torch.manual_seed(0)
    rq = ResidualVQ(8, num_quantizers=2, codebook_size=16)
    assert not rq.codebooks.any() and rq.updates == 0
    x = 5 + vectors()  # no code near zero would do
    rq.train()(x)
    assert rq.updates == 1
    assert (x - rq.eval()(x)[0]).square().mean() < 0.8 * x.var()


def test_a_batch_smaller_than_a_codebook_initialises():
    torch.manual_seed(0)
    rq = ResidualVQ(8, num_quantizers=2, codebook_size=16)
    quantized, codes, _ = rq.train()(vectors(batch=1, frames=1))
    assert torch.isfinite(quantized).all() and codes.shape == (1, 1, 2)


def test_evaluation_moves_nothing(rq):
    before = {name: value.clone() for name, value in rq.state_dict().items()}
    rq(vectors(1))
    rq.encode(vectors(2))
    assert all(torch.equal(before[name], value) for name, value in rq.state_dict().items())
    rq.train()(vectors(1))
    assert not torch.equal(before["codebooks"], rq.codebooks)


def test_training_follows_the_vectors(rq):
    shifted = vectors() + 1
    before = (shifted - rq(shifted)[0]).square().mean()
    rq.train()
    for _ in range(100):
        rq(shifted)
    assert (shifted - rq.eval()(shifted)[0]).square().mean() < 0.7 * before


def test_dropped_levels_contribute_nothing():
    torch.manual_seed(0)
    rq = ResidualVQ(8, num_quantizers=4, codebook_size=16, quantizer_dropout=1.0)
    rq.train()(vectors(batch=40))
    books = rq.codebooks.clone()
    quantized, codes, _ = rq(vectors(1, batch=40))
    kept = (codes >= 0).sum(2)
    assert set(kept.flatten().tolist()) == {1, 2, 3, 4}  # by row, a prefix of at least one
    assert (kept == kept[:, :1]).all()
    for row, levels in enumerate(kept[:, 0].tolist()):
        assert (codes[row, :, levels:] == -1).all() and (codes[row, :, :levels] >= 0).all()
        slow = sum(books[q][codes[row, :, q]] for q in range(levels))
        torch.testing.assert_close(quantized[row], slow)


def test_no_quantizer_dropout_in_evaluation():
    torch.manual_seed(0)
    rq = ResidualVQ(8, num_quantizers=4, codebook_size=16, quantizer_dropout=1.0)
    rq.train()(vectors(batch=40))
    assert (rq.eval()(vectors(1, batch=40))[1] >= 0).all()


def test_half_precision_vectors_keep_their_dtype(rq):
    quantized, codes, _ = rq(vectors(1).bfloat16())
    assert quantized.dtype == torch.bfloat16 and codes.dtype == torch.int64
