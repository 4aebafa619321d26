"""The one training loop: every gradient-trained model goes through it, resumable at any step."""

import json
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
    json_text,
    read_json,
    read_tensors,
    save_model,
    write_tensors,
)
from musiclm_engine.training.learner import Learner, descend
from musiclm_engine.training.schedule import Schedule

Losses = dict[str, Tensor]

CHECKPOINT = "checkpoint.safetensors"
READ_EVERY = 10  # steps: reading a figure waits for all that a GPU has been given to do


@dataclass
class Adversary:
    """What learns to tell what the model makes from the real thing.

    Attributes:
        model: trained beside the recipe's, on the losses of the same steps, and held by the
            checkpoint, but not by the model that is saved.
        rate: its learning rate, in those of the schedule.
    """

    model: nn.Module
    rate: float = 1.0


@dataclass
class Recipe:
    """What there is to train and on what.

    Attributes:
        model: with `config`, so that it can be saved.
        losses: the losses of step n in training mode, "loss" the one to descend. Batches are a
            function of the step's number, so a resumed run sees what an uninterrupted one would.
            In a step with an "adversary_loss" too the adversary descends that: both losses come of
            the same weights, "loss" moves the model alone and "adversary_loss" the adversary alone.
        validation: figures of the model in evaluation mode.
        adversary: of the model, if it has one.
    """

    model: nn.Module
    losses: Callable[[int], Losses]
    validation: Callable[[], dict[str, float]]
    adversary: Adversary | None = None


def fit(
    recipe: Recipe,
    schedule: Schedule,
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    minutes: float | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from where run_dir stands to the schedule's end, yielding (steps done, figures).

    Figures are "train/progress" at every step, and on a GPU the others at every tenth and where
    something is validated or saved. run_dir gets checkpoint.safetensors, which is all that resuming
    reads; model.safetensors and model.json, for others to load; and TensorBoard's event files.

    Args:
        minutes: stop (and save) after this long, to be resumed later.

    Raises:
        FloatingPointError: a loss or a gradient is not finite; the last checkpoint is left as it
            was.
    """
    model = recipe.model.to(device)
    learners = [Learner(model, schedule)]
    if recipe.adversary is not None:
        opponent = recipe.adversary.model.to(device).train()
        learners.append(
            Learner(
                opponent,
                schedule,
                prefix="adversary_",
                betas=(0.5, 0.9),  # MelGAN's (arXiv 1910.06711): its task changes as it learns
                rate=recipe.adversary.rate,
            )
        )
    done, seconds_before = _resume(learners, run_dir)
    writer = _summary_writer(run_dir, done)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=schedule.precision == "bf16")
    started = saved = time.monotonic()
    seconds = seconds_before
    unread: dict[str, Tensor] = {}  # losses and norms of gradients, none of which may be infinite
    out_of_time = False
    with closing(writer):
        while schedule.progress(done, seconds) < 1 and not out_of_time:
            torch.manual_seed(seed * 1_000_003 + done)
            model.train()
            with autocast:
                losses = recipe.losses(done)
            learning = [learner for learner in learners if learner.loss_name in losses]
            norms = descend(learning, losses, rate=schedule.rate(done, seconds), clip=schedule.clip)
            for learner in learning:
                loss, norm = losses[learner.loss_name].detach(), norms[learner.norm_name]
                unread[f"the {learner.loss_name} of step {done}"] = loss
                unread[f"the {learner.prefix}gradient of step {done}"] = norm
            done += 1
            now = time.monotonic()
            seconds = seconds_before + now - started
            figures = {"train/progress": min(1.0, schedule.progress(done, seconds))}
            out_of_time = minutes is not None and now - started > 60 * minutes
            last = figures["train/progress"] == 1 or out_of_time
            validates = done % schedule.validate_every == 0 or last
            saves = now - saved > schedule.save_every_seconds or last
            if device.type == "cpu" or done % READ_EVERY == 0 or validates or saves:
                _refuse_divergence(unread)
                unread.clear()
                figures |= {f"train/{name}": x.item() for name, x in (losses | norms).items()}
            if validates:
                model.eval()
                with torch.no_grad(), autocast:
                    for name, figure in recipe.validation().items():
                        figures[f"validation/{name}"] = figure
            for name, figure in figures.items():
                writer.add_scalar(name, figure, done)
            if saves:
                _save(learners, run_dir, done, seconds)
                saved = time.monotonic()
            yield done, figures


def _refuse_divergence(unread: dict[str, Tensor]) -> None:
    """Before anything is saved: one step that is not finite spoils every weight."""
    for what, found in zip(unread, torch.stack(list(unread.values())).tolist(), strict=True):
        if not math.isfinite(found):
            raise FloatingPointError(f"{what} is {found}")


def _save(learners: list[Learner], run_dir: Path, done: int, seconds: float) -> None:
    # Rounded as it will be bundled: what is trained on its output sees what will run. Written before
    # the checkpoint, which may say that training is done: then the model must be there.
    save_model(learners[0].model, run_dir / "model", dtype=torch.float16)
    # One file, so that weights, moments and step cannot come from different moments.
    tensors = {
        "steps": torch.tensor(done),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }
    for learner in learners:
        tensors |= learner.tensors()
    write_tensors(run_dir / CHECKPOINT, tensors)


def _resume(learners: list[Learner], run_dir: Path) -> tuple[int, float]:
    """Take up the checkpoint in run_dir, if there is one: the steps and seconds it has seen."""
    path = run_dir / CHECKPOINT
    if not path.exists():
        return 0, 0.0
    tensors = read_tensors(path)
    if "steps" not in tensors:
        raise CheckpointError(f"{path} is no checkpoint of a training: it has no steps")
    steps = int(tensors.pop("steps"))
    seconds = float(tensors.pop("seconds", 0.0))
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    if not parts:
        raise CheckpointError(
            f"{path} says only how long its model was trained, which is done and came in a parcel: "
            "give the same steps and minutes, or remove that folder to train it anew"
        )
    try:
        _refuse_another(learners[0].model, run_dir / "model.json")
        for learner in learners:
            weights = parts.pop(f"{learner.prefix}model", {})
            moments = parts.pop(f"{learner.prefix}optimizer", {})
            if weights or learner is learners[0]:  # an adversary may come in later
                learner.load(weights, moments)
        if parts:
            raise RuntimeError(f"it holds {', '.join(parts)} too")
    except RuntimeError as error:
        raise CheckpointError(
            f"{run_dir} holds another model than the config describes; "
            f"train it elsewhere or remove that folder: {error}"
        ) from None
    return steps, seconds


def _refuse_another(model: Any, description: Path) -> None:
    """Weights may fit a model that means something else by them: another vocabulary."""
    if not description.exists():  # it came in a parcel
        return
    config, content = json.loads(json_text(model.config)), read_json(description)
    stored = content.get("config") if isinstance(content, dict) else None
    if not isinstance(stored, dict):
        raise CheckpointError(f'{description} does not tell a "config"')
    differ = [name for name, value in config.items() if stored.get(name) != value]
    if differ:
        raise RuntimeError(f"{', '.join(differ)} came out otherwise, of config or manifest")


def _summary_writer(run_dir: Path, done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # of the extra `train`

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=done or None)
