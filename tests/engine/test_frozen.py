"""Functions compiled with their weights as constants."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from musiclm_engine.generation.frozen import Frozen


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class Weights:
    parts: tuple[Pair, ...]
    scale: float


class Buffers(NamedTuple):
    x: Tensor
    grown: Tensor


def add_products(weights: Weights, buffers: Buffers, *, power: int) -> None:
    x = buffers.x
    for pair in weights.parts:
        x = torch.tanh(x @ pair.first.T) * weights.scale
        if pair.second is not None:
            x = x + pair.second
    buffers.x.copy_(x)
    buffers.grown.add_(power)


def weights_of(seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, 16, 16, generator=generator) / 4
    return Weights((Pair(matrices[0], torch.ones(16)), Pair(matrices[1], None)), 0.5 + seed)


@pytest.fixture(scope="module")
def frozen():
    def two(weights, buffers):
        add_products(weights, buffers, power=2)

    return [(weights_of(seed), Frozen(two, weights_of(seed))) for seed in (0, 1)]


def test_each_has_its_own_weights_call_after_call(frozen):
    """Two compilations of the same code, by turns, and other sizes where they were said to come."""
    with torch.inference_mode(False):
        wanted, found = ([torch.ones(3, 16) for _ in frozen] for _ in range(2))
        grown = torch.zeros(9, 2)
    with torch.no_grad():
        for size in (4, 6, 4, 8):
            for number, (weights, compiled) in enumerate(frozen):
                part = grown[:size]
                torch._dynamo.mark_dynamic(part, 0)
                compiled(Buffers(found[number], part))
                add_products(weights, Buffers(wanted[number], grown[:0]), power=2)
                torch.testing.assert_close(found[number], wanted[number])
    assert not torch.allclose(found[0], found[1])
    assert grown[:, 0].tolist() == [16.0] * 4 + [8.0] * 2 + [4.0] * 2 + [0.0]


def test_constants_are_those_of_the_first_call():
    weights = weights_of(2)
    compiled = Frozen(lambda w, b: add_products(w, b, power=0), weights)
    x, grown = torch.ones(3, 16), torch.zeros(2, 2)
    with torch.no_grad():
        compiled(Buffers(x, grown))
        first = x.clone()
        weights.parts[0].first.zero_()
        x.fill_(1.0)
        compiled(Buffers(x, grown))
    assert torch.equal(x, first)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_number_made_of_weights_is_made_of_these(seed):
    """Compiled twice in turn: a cache of compiled graphs would give the second the first's sum."""

    def add_sum(weight, x):
        x.add_(weight.sum())

    weight = weights_of(seed).parts[0].first
    with torch.inference_mode(False):
        x = torch.zeros(3)
    with torch.no_grad():
        Frozen(add_sum, weight)(x)
    torch.testing.assert_close(x, weight.sum().expand(3))
