"""Which optimiser moves which weights, and what a checkpoint holds of them."""

import pytest
import torch
from torch import nn

from musiclm_engine.training.learner import Learner, descend
from musiclm_engine.training.schedule import Schedule

SCHEDULE = Schedule(steps=10, weight_decay=0.0, clip=1e9)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.square = nn.Linear(32, 32, bias=False)
        self.wide = nn.Linear(32, 64, bias=False)
        self.narrow = nn.Linear(64, 2)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def step(learner: Learner, model: Model, rate: float = 1e-2) -> None:
    generator = torch.Generator().manual_seed(1)
    # Random gradients, of full rank.
    loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters())
    descend([learner], {"loss": loss}, rate=rate, clip=SCHEDULE.clip)


def test_muon_moves_linear_weights_by_equal_singular_values(model: Model) -> None:
    learner = Learner(model, SCHEDULE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(learner, model, rate=1e-2)
    for name in ("square.weight", "wide.weight"):
        moved = model.get_parameter(name).detach() - before[name]
        singular = torch.linalg.svdvals(moved)
        # Newton-Schulz leaves most between 0.7 and 1.2; a random square matrix has one near 0.
        assert singular.quantile(0.1) > 0.5 * singular.max()
        # As large as a step of AdamW, of which every entry is about the rate: 0.2 of it, times
        # sqrt(max(shape)) over that many equal directions (arXiv 2502.16982, section 2.2).
        assert moved.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.3)
    for name in ("embedding.weight", "narrow.weight", "narrow.bias"):  # Adam's first step: the rate
        moved = model.get_parameter(name).detach() - before[name]
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=0.02, atol=0)


def test_every_weight_has_one_optimiser(model: Model) -> None:
    learner = Learner(model, SCHEDULE)
    moved = [
        id(p)
        for optimizer in learner.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(moved) == sorted(id(p) for p in model.parameters())


def test_a_model_without_matrices_has_adam_alone() -> None:
    learner = Learner(nn.Conv1d(2, 2, 3), SCHEDULE)
    assert [type(optimizer) for optimizer in learner.optimizers] == [torch.optim.AdamW]


def test_frozen_weights_stay(model: Model) -> None:
    model.square.weight.requires_grad_(False)
    before = model.square.weight.clone()
    learner = Learner(model, SCHEDULE)
    step(learner, model)
    assert torch.equal(model.square.weight, before)


def test_moments_come_back(model: Model) -> None:
    learner = Learner(model, SCHEDULE)
    step(learner, model)
    kept = {name: value.clone() for name, value in learner.tensors().items()}
    step(learner, model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    other = Model()
    again = Learner(other, SCHEDULE)
    weights = {k.removeprefix("model/"): v for k, v in kept.items() if k.startswith("model/")}
    moments = {
        k.removeprefix("optimizer/"): v for k, v in kept.items() if k.startswith("optimizer/")
    }
    again.load(weights, moments)
    step(again, other)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("place", ["3/exp_avg", "7.0/exp_avg"])
def test_moments_of_other_optimisers_are_refused(model: Model, place: str) -> None:
    learner = Learner(model, SCHEDULE)
    with pytest.raises(RuntimeError, match="belong to another optimiser"):
        learner.load(model.state_dict(), {place: torch.zeros(1)})
