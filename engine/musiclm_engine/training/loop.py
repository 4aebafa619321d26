"""The one training loop: every gradient-trained model goes through it, resumable at any step."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musiclm_engine.checkpoint import (
    CheckpointError,
    read_tensors,
    save_model,
    write_tensors,
)

Losses = dict[str, Tensor]

PRECISIONS = ("fp32", "bf16")
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: in all.
        learning_rate: at its plateau, after `warmup` steps and before the last quarter of all
            steps, over which it falls to nothing.
        warmup: steps of linear rise.
        weight_decay: of AdamW, on matrices.
        clip: largest norm of a gradient.
        validate_every: steps.
        save_every_seconds: of training.
        precision: "fp32", or "bf16" for matrix products rounded to bfloat16 (autocast).
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    validate_every: int = 250
    save_every_seconds: float = 120.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, wanted a whole number of at least 1")
        for name in ("learning_rate", "warmup", "weight_decay", "clip", "save_every_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}, wanted a number from 0 up")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}, wanted one of {', '.join(PRECISIONS)}"
            )

    def rate(self, step: int) -> float:
        cooldown = max(1, self.steps // 4)
        return self.learning_rate * min(
            1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / cooldown
        )


@dataclass
class Recipe:
    """What there is to train and on what.

    Attributes:
        model: with `config`, so that it can be saved.
        losses: the losses of step n in training mode, "loss" the one to descend. Batches are a
            function of the step's number, so a resumed run sees what an uninterrupted one would.
        validation: figures of the model in evaluation mode.
    """

    model: nn.Module
    losses: Callable[[int], Losses]
    validation: Callable[[], dict[str, float]]


def fit(
    recipe: Recipe,
    schedule: Schedule,
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    minutes: float | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from where run_dir stands to schedule.steps, yielding (steps done, figures) each step.

    run_dir gets checkpoint.safetensors, which is all that resuming reads; model.safetensors and
    model.json, for others to load; and TensorBoard's event files.

    Args:
        minutes: stop (and save) after this long, to be resumed later.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the last checkpoint is left as it
            was.
    """
    model = recipe.model.to(device)
    optimizer = torch.optim.AdamW(_groups(model, schedule), betas=(0.9, 0.95))
    done = _resume(model, optimizer, run_dir)
    writer = _summary_writer(run_dir, done)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=schedule.precision == "bf16")
    started = saved = time.monotonic()
    out_of_time = False
    with closing(writer):
        while done < schedule.steps and not out_of_time:
            torch.manual_seed(seed * 1_000_003 + done)
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(done)
            with autocast:
                losses = recipe.losses(done)
            if not torch.isfinite(losses["loss"]):
                raise FloatingPointError(f"the loss of step {done} is {losses['loss'].item()}")
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            if not torch.isfinite(norm):  # a step would spoil every weight, and then be saved
                raise FloatingPointError(f"the gradient of step {done} is {norm.item()}")
            optimizer.step()
            done += 1
            figures = {f"train/{name}": loss.item() for name, loss in losses.items()}
            figures["train/gradient_norm"] = norm.item()
            out_of_time = minutes is not None and time.monotonic() - started > 60 * minutes
            last = done == schedule.steps or out_of_time
            if done % schedule.validate_every == 0 or last:
                model.eval()
                with torch.no_grad(), autocast:
                    for name, figure in recipe.validation().items():
                        figures[f"validation/{name}"] = figure
            for name, figure in figures.items():
                writer.add_scalar(name, figure, done)
            if last or time.monotonic() - saved > schedule.save_every_seconds:
                _save(model, optimizer, run_dir, done)
                saved = time.monotonic()
            yield done, figures


def _groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, run_dir: Path, done: int) -> None:
    # One file, so that weights, moments and step cannot come from different moments.
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    write_tensors(run_dir / CHECKPOINT, tensors | {"steps": torch.tensor(done)})
    save_model(model, run_dir / "model")


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, run_dir: Path) -> int:
    """Take up the checkpoint in run_dir, if there is one: the number of steps it has seen."""
    path = run_dir / CHECKPOINT
    if not path.exists():
        return 0
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    tensors = read_tensors(path)
    if "steps" not in tensors:
        raise CheckpointError(f"{path} is no checkpoint of a training: it has no steps")
    steps = int(tensors.pop("steps"))
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "model":
            weights[name] = value
        else:
            index, _, name = name.partition("/")
            moments.setdefault(int(index), {})[name] = value
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{run_dir} holds another model than the config describes; "
            f"train it elsewhere or remove that folder: {error}"
        ) from None
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return steps


def _summary_writer(run_dir: Path, done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # of the extra `train`

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=done or None)
