"""The training loop: resumed is uninterrupted, and what diverges spoils nothing."""

import itertools
import math

import pytest
import torch
from torch import nn

from musiclm_engine.checkpoint import CheckpointError, read_tensors
from musiclm_engine.training.loop import Recipe, Schedule, fit

CPU = torch.device("cpu")


class Toy(nn.Module):
    """Has what could go wrong in resuming: dropout, a buffer that moves, a frozen weight."""

    def __init__(self, width=8):
        super().__init__()
        self.config = {"width": width}
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.layers(x)[:, 0]


def recipe(width=8, loss_at=lambda step, loss: loss):
    torch.manual_seed(0)
    model = Toy(width)

    def losses(step):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1)).square().mean()
        return {"loss": loss_at(step, loss), "other": loss.detach() * 2}

    def validation():
        assert not model.training
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(-1))
        return {"error": (model(x) - x.sum(1)).square().mean().item() + 0 * torch.rand(1).item()}

    return Recipe(model, losses, validation)


SCHEDULE = Schedule(steps=12, learning_rate=1e-2, warmup=3, validate_every=5)


def run(folder, steps=None, schedule=SCHEDULE, **arguments):
    return list(
        itertools.islice(fit(recipe(**arguments), schedule, folder, seed=0, device=CPU), steps)
    )


def weights(folder):
    return read_tensors(folder / "model.safetensors")


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resumed_is_uninterrupted(tmp_path, stop):
    whole = run(tmp_path / "whole")
    every_step = Schedule(**{**vars(SCHEDULE), "save_every_seconds": 0.0})
    first = run(tmp_path / "parts", stop, every_step)
    assert int(read_tensors(tmp_path / "parts" / "checkpoint.safetensors")["steps"]) == stop
    rest = run(tmp_path / "parts")
    assert [done for done, _ in first + rest] == list(range(1, 13))
    assert [figures for _, figures in first + rest] == [figures for _, figures in whole]
    for one, other in zip(
        weights(tmp_path / "whole").items(), weights(tmp_path / "parts").items(), strict=True
    ):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


def test_minutes_stop_it_and_the_same_call_goes_on(tmp_path):
    stopped = list(fit(recipe(), SCHEDULE, tmp_path, seed=0, device=CPU, minutes=0.0))
    assert len(stopped) == 1 and "validation/error" in stopped[-1][1]
    assert [done for done, _ in run(tmp_path)] == list(range(2, 13))


def test_a_finished_run_stays_as_it_is(tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert run(tmp_path) == []
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_the_seed_decides(tmp_path):
    run(tmp_path / "0")
    list(fit(recipe(), SCHEDULE, tmp_path / "1", seed=1, device=CPU))
    assert not torch.equal(
        weights(tmp_path / "0")["layers.0.weight"], weights(tmp_path / "1")["layers.0.weight"]
    )


def test_it_learns_validates_and_leaves_the_frozen_alone(tmp_path):
    told = run(tmp_path, schedule=Schedule(steps=150, learning_rate=2e-2, warmup=5))
    assert told[-1][1]["validation/error"] < 0.5 * told[0][1]["train/loss"]
    assert (weights(tmp_path)["frozen"] == 1).all() and weights(tmp_path)["seen"] == 150
    validated = [done for done, figures in run(tmp_path / "v") if "validation/error" in figures]
    assert validated == [5, 10, 12]
    assert {"train/loss", "train/other", "train/gradient_norm"} <= told[0][1].keys()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_rate_rises_stays_and_falls():
    schedule = Schedule(steps=100, learning_rate=2.0, warmup=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates[10:75] == [2.0] * 65
    assert rates[75:] == pytest.approx([2.0 * n / 25 for n in range(25, 0, -1)])
    assert all(rate > 0 for rate in rates)
    assert Schedule(steps=1, learning_rate=2.0, warmup=0).rate(0) == 2.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, broken):
    run(tmp_path, 4, Schedule(steps=12, save_every_seconds=0.0))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(FloatingPointError, match="the loss of step 4 is"):
        run(tmp_path, loss_at=lambda step, loss: loss * broken)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    """The loss itself is finite: sqrt at zero. A step would turn every weight to NaN."""
    every_step = Schedule(steps=12, save_every_seconds=0.0)
    run(tmp_path, 4, every_step)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(FloatingPointError, match="the gradient of step 4 is"):
        run(tmp_path, schedule=every_step, loss_at=lambda step, loss: (loss * 0).sqrt())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_another_model_is_not_resumed(tmp_path):
    run(tmp_path, 4, Schedule(steps=12, save_every_seconds=0.0))
    with pytest.raises(CheckpointError, match="holds another model than the config describes"):
        run(tmp_path, width=16)


@pytest.mark.parametrize("content", ["{}", "[]", '{"config": null}', "{"])
def test_a_broken_description_is_named(tmp_path, content):
    run(tmp_path, 4, Schedule(steps=12, save_every_seconds=0.0))
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.json"):
        run(tmp_path)


def test_a_broken_checkpoint_is_named(tmp_path):
    run(tmp_path, 4, Schedule(steps=12, save_every_seconds=0.0))
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=path.name):
            run(tmp_path)
    path.write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no checkpoint of a training"):
        run(tmp_path)


def test_resuming_reads_one_file(tmp_path):
    """So a run killed while it saved cannot mix the weights of one step with another's count."""
    run(tmp_path, 4, Schedule(steps=12, save_every_seconds=0.0))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.json").unlink()
    assert run(tmp_path)[0][0] == 5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": 5, "validate_every": 0}, "validate_every is 0"),
        ({"steps": 5, "precision": "fp8"}, "precision is 'fp8', wanted one of fp32, bf16"),
        ({"steps": 5, "learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"steps": 5, "clip": math.nan}, "clip is nan"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_bfloat16_trains_float32_weights(tmp_path):
    run(tmp_path, schedule=Schedule(steps=3, precision="bf16"))
    held = read_tensors(tmp_path / "checkpoint.safetensors")
    trained = [value for name, value in held.items() if name.startswith("model/")]
    assert trained and all(value.dtype in (torch.float32, torch.int64) for value in trained)
