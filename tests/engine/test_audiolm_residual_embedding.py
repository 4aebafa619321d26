"""Conditioning tokens: what their embeddings hold of the vector that was quantised."""

import pytest
import torch

from musiclm_engine.audiolm.residual_embedding import ResidualEmbedding
from musiclm_engine.mulan import MuLaNEmbedQuantizer

LEVELS, SIZE, WIDTH, DIM = 3, 8, 16, 12


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    quantizer = MuLaNEmbedQuantizer(WIDTH, num_quantizers=LEVELS, codebook_size=SIZE)
    quantizer.fit(torch.randn(200, WIDTH), seed=0)
    return quantizer


@pytest.fixture
def embedding(quantizer):
    embedding = ResidualEmbedding(LEVELS, SIZE, WIDTH, DIM)
    embedding.take_codebooks(quantizer.codebooks)
    return embedding


def test_each_level_embeds_what_is_decoded_up_to_it(quantizer, embedding):
    tokens = quantizer.encode(torch.randn(5, WIDTH))
    embedded = embedding(tokens)
    assert embedded.shape == (5, LEVELS, DIM)
    for level in range(LEVELS):
        upto = tokens.clone()
        upto[:, level + 1 :] = -1  # which add nothing
        torch.testing.assert_close(embedded[:, level], embedding.expand(quantizer.decode(upto)))


def test_the_token_for_none_adds_nothing(embedding):
    none = embedding(torch.full((1, LEVELS), SIZE))
    torch.testing.assert_close(none[0], embedding.expand.bias.expand(LEVELS, DIM))


def test_codebooks_do_not_learn_and_codes_without_them_do(embedding):
    learnt = ResidualEmbedding(LEVELS, SIZE, WIDTH, DIM)
    for each in (embedding, learnt):
        each(torch.tensor([[0, 1, SIZE]])).square().sum().backward()
    assert embedding.codes.weight.grad is None and embedding.expand.weight.grad.any()
    moved = learnt.codes.weight.grad.view(LEVELS, SIZE + 1, WIDTH).abs().sum(-1) > 0
    assert moved.nonzero().tolist() == [[0, 0], [1, 1], [2, SIZE]]


def test_codebooks_of_another_shape_are_refused(embedding, quantizer):
    with pytest.raises(ValueError, match=r"codebooks is \(3, 7, 16\), wanted \(3, 8, 16\)"):
        embedding.take_codebooks(quantizer.codebooks[:, :7])
