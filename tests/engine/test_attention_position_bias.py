"""Position biases against their formulas, and what may be done with one."""

import math

import pytest
import torch
from torch.func import functional_call

from musiclm_engine.attention import (
    AlibiBias,
    DynamicPositionBias2d,
    LogSpacedPositionBias,
    PositionBias,
    RelativePositionBias,
    T5PositionBias,
    alibi_slopes,
)
from musiclm_engine.attention.position_bias import dense_position_bias
from musiclm_kernels import biased_attention

HEADS = 2


def made(name: str) -> tuple[torch.nn.Module, tuple]:
    """A module of each kind, and arguments of its `position_bias` that make 6 queries and keys."""
    torch.manual_seed(0)
    return {
        "relative": (RelativePositionBias(dim=4, heads=HEADS), (6, 6)),
        "dynamic": (DynamicPositionBias2d(4, HEADS), (3, 2)),
        "log-spaced": (LogSpacedPositionBias(HEADS), ((3, 2),)),
        "t5": (T5PositionBias(HEADS, num_buckets=8, max_distance=6), (6, 6)),
        "alibi": (AlibiBias(HEADS), (6, 6)),
    }[name]


EVERY = pytest.mark.parametrize("name", ["relative", "dynamic", "log-spaced", "t5", "alibi"])
LEARNED = pytest.mark.parametrize("name", ["relative", "dynamic", "log-spaced", "t5"])


def some_bias(num_queries: int = 4, num_keys: int = 6) -> PositionBias:
    torch.manual_seed(0)
    return RelativePositionBias(dim=4, heads=HEADS).position_bias(num_queries, num_keys)


@EVERY
def test_attention_adds_the_bias_of_every_pair(name):
    module, arguments = made(name)
    bias = module.position_bias(*arguments)
    q, k, v = torch.randn(3, 2, HEADS, 6, 4)
    weights = (q @ k.mT / 2 + bias.dense()).softmax(-1)
    torch.testing.assert_close(biased_attention(q, k, v, **bias.arguments()), weights @ v)


@EVERY
def test_the_table_is_small_and_float32(name):
    module, arguments = made(name)
    bias = module.position_bias(*arguments)
    assert bias.table.dtype == torch.float32 and bias.table.shape[0] == HEADS
    assert bias.table.shape[1] <= 15  # of 6 tokens: 11 on a line, 5 x 3 on a grid; never 36
    assert bias.q_codes.dtype == bias.k_codes.dtype == torch.int32


@LEARNED
def test_half_precision_weights_still_make_an_exact_table(name):
    module, arguments = made(name)
    module.bfloat16()
    halved = module.position_bias(*arguments).table
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = module.float().position_bias(*arguments).table
    exact = module.position_bias(*arguments).table
    assert torch.equal(halved, exact) and torch.equal(under_autocast, exact)


@LEARNED
def test_gradients_reach_the_weights(name):
    module, arguments = made(name)
    module.double()
    names, weights = zip(*module.named_parameters(), strict=True)
    q, k, v = torch.randn(3, 1, HEADS, 6, 3, dtype=torch.float64)

    class Attended(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = module

        def forward(self):
            return biased_attention(q, k, v, **self.bias.position_bias(*arguments).arguments())

    attended = Attended()

    def output(*weights):
        named = {f"bias.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return functional_call(attended, named, ())

    assert module.position_bias(*arguments).table.dtype == torch.float64
    fast = sum(weight.numel() for weight in weights) > 200
    assert torch.autograd.gradcheck(output, weights, fast_mode=fast)


def test_relative_bias_is_the_network_of_the_distance():
    torch.manual_seed(0)
    module = RelativePositionBias(dim=4, heads=HEADS, layers=2)
    distance = torch.arange(3, 7)[:, None] - torch.arange(7)
    wanted = module.net(distance[..., None].float()).movedim(-1, 0)
    torch.testing.assert_close(module(4, 7), wanted)
    assert module.bfloat16()(4, 7).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="5 queries of 3 keys"):
        module(5, 3)
    with pytest.raises(ValueError, match="layers=0"):
        RelativePositionBias(dim=4, heads=HEADS, layers=0)


def test_offsets_of_the_log_spaced_bias():
    """Equation 4 of arXiv 2111.09883 and its normalisation, one pair at a time."""
    torch.manual_seed(0)
    module = LogSpacedPositionBias(HEADS)
    for window, pretrained in [((3, 2), (0, 0)), ((2, 4), (8, 6)), ((1, 3), (0, 0))]:
        bias = module.position_bias(window, pretrained).dense()[0]
        trained = pretrained if pretrained[0] else window
        places = [(y, x) for y in range(window[0]) for x in range(window[1])]
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                offset = [
                    8 * (q - k) / max(size - 1, 1)
                    for q, k, size in zip(query, key, trained, strict=True)
                ]
                spaced = [math.copysign(math.log2(abs(d) + 1) / 3, d) for d in offset]
                wanted = 16 * module(torch.tensor(spaced)).sigmoid()
                torch.testing.assert_close(bias[:, i, j], wanted)


def test_slopes_of_alibi():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    # the published get_slopes(12): those of 8, then each second one of 16
    assert alibi_slopes(12)[8:].tolist() == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])
    with pytest.raises(ValueError, match="heads=0"):
        AlibiBias(0)


def test_alibi_falls_with_the_distance():
    distance = torch.arange(2, 6)[:, None] - torch.arange(6)
    slopes = alibi_slopes(HEADS)[:, None, None]
    assert torch.equal(AlibiBias(HEADS)(4, 6), -slopes * distance)
    assert torch.equal(AlibiBias(HEADS, symmetric=True)(4, 6), -slopes * distance.abs())
    assert not AlibiBias(HEADS).state_dict()


def test_t5_bias_of_tokens_further_on():
    torch.manual_seed(0)
    module = T5PositionBias(HEADS, num_buckets=8, max_distance=20, bidirectional=False)
    whole = module.position_bias(9, 9).dense()
    torch.testing.assert_close(module.position_bias(2, 9).dense(), whole[:, :, -2:])
    torch.testing.assert_close(module.position_bias(2, 9, first_query=4).dense(), whole[:, :, 4:6])


def test_kept_tokens_keep_their_bias():
    torch.manual_seed(0)
    bias = DynamicPositionBias2d(4, HEADS).position_bias(5, 3)
    indices = torch.stack([torch.randperm(15)[:6].sort().values for _ in range(3)])
    kept = bias.kept(indices)
    assert kept.table is bias.table and kept.q_codes.shape == (3, 6)
    whole = bias.dense()[0]
    for row, chosen in zip(kept.dense(), indices, strict=True):
        assert torch.equal(row, whole[:, chosen][:, :, chosen])
    fewer = kept.kept(torch.tensor([[0, 5]] * 3))
    assert torch.equal(fewer.dense(), kept.dense()[:, :, [0, 5]][..., [0, 5]])


def test_keys_without_a_bias_come_first():
    bias = some_bias()
    wider = bias.with_unbiased_keys(3)
    assert torch.equal(wider.dense(), torch.nn.functional.pad(bias.dense(), (3, 0)))


@pytest.mark.parametrize("table", ["small", "large"])
def test_regions_are_an_added_mask(table):
    bias = LogSpacedPositionBias(HEADS).position_bias((2, 3))
    regions = torch.tensor([[0, 0, 1, 2, 2, 3], [0, 0, 0, 0, 0, 0]])
    num_regions = 4 if table == "small" else 9
    within = bias.within_regions(regions, num_regions, between=-7.0)
    assert within.table.shape[1] == (2 * num_regions - 1) * bias.table.shape[1]
    mask = -7.0 * (regions[:, :, None] != regions[:, None, :])
    assert torch.equal(within.dense(), bias.dense() + mask[:, None])
    assert torch.equal(within.repeated(2).dense(), within.dense().repeat(2, 1, 1, 1))
    # still codes of a grid with this many rows
    assert within.grid_rows == 3 and bool(((within.q_codes % 5) < 3).all())


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (3, 4, 5), (3, 1, 1), (4, 5), (5,)])
def test_a_bias_for_every_pair_becomes_a_table(shape):
    bias = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    made = dense_position_bias(bias, (2, 3, 4, 5), "bias")
    assert made.table.dtype == torch.float32
    assert torch.equal(made.dense().expand(2, 3, 4, 5), bias.float().expand(2, 3, 4, 5))
    made.dense().sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, made.table.numel() / bias.numel()))


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 5), (1, 2, 3, 4, 5), (3, 3, 4, 5)])
def test_a_bias_that_does_not_broadcast_is_refused(shape):
    with pytest.raises(ValueError, match="attn_bias has shape"):
        dense_position_bias(torch.zeros(shape), (2, 3, 4, 5), "attn_bias")


def test_a_bias_of_too_many_pairs_is_refused():
    with pytest.raises(ValueError, match="attn_bias has 1073774592 pairs"):
        dense_position_bias(torch.zeros(1), (1, 1, 32768, 32769), "attn_bias")
