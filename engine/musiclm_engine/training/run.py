"""Train a set of models, or one of it: what `musiclm train` does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from musiclm_engine.training.codec_recipe import codec_recipe
from musiclm_engine.training.config import (
    SCHEDULE,
    TRAINED,
    ConfigError,
    load_config,
    models_of,
    table,
)
from musiclm_engine.training.facts import tempi_of
from musiclm_engine.training.fitted import fit_quantizer, fit_tokenizer
from musiclm_engine.training.loop import CHECKPOINT, Recipe, fit
from musiclm_engine.training.mulan_recipe import mulan_recipe
from musiclm_engine.training.parcel import COUNTS, pack
from musiclm_engine.training.schedule import Schedule
from musiclm_engine.training.semantic_recipe import semantic_encoder_recipe
from musiclm_engine.training.stage_recipe import stage_recipe
from musiclm_engine.training.tempo_recipe import tempo_recipe
from musiclm_engine.training.workplace import Workplace

Report = Callable[[str, int, int, dict[str, float]], None]  # what is done, how far, figures

FITTED: dict[str, Callable[[Workplace], Any]] = {
    "tokenizer": fit_tokenizer,
    "quantizer": fit_quantizer,
}
RECIPES: dict[str, Callable[[Workplace], Recipe]] = {
    "codec": codec_recipe,
    "semantic_encoder": semantic_encoder_recipe,
    "mulan": mulan_recipe,
    "tempo_reader": tempo_recipe,
    "semantic": lambda place: stage_recipe(place, "semantic"),
    "coarse": lambda place: stage_recipe(place, "coarse"),
    "fine": lambda place: stage_recipe(place, "fine"),
}


@dataclass(frozen=True)
class Limits:
    """How long training may take.

    Attributes:
        minutes: of the whole set, which the models divide as the configuration's shares say; None
            leaves the end to the configuration's steps.
        stop_at: when to save and stop, on the clock of `time.monotonic`, to be resumed later.
    """

    minutes: float | None = None
    stop_at: float | None = None


def checked_config(name: str, config: str) -> dict[str, Any]:
    """The configuration; refuses at once what `train` could not begin with.

    Raises:
        ValueError: name is of no model.
        ConfigError: see `load_config`.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    if name not in (*TRAINED, "all"):
        raise ValueError(f"name is {name!r}, wanted one of {', '.join(TRAINED)}, all")
    if find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            'training writes TensorBoard logs: pip install "musiclm-engine[train]"'
        )
    return load_config(config)


def train(
    name: str,
    *,
    config: str,
    manifest: Path,
    run_dir: Path,
    device: torch.device,
    limits: Limits = Limits(),
    parcel: Path | None = None,
    report: Report,
) -> bool:
    """Train, or go on training, one of `TRAINED` in run_dir, or "all" of them in their order.

    Most build on those before them in `TRAINED`; a missing one is named by the error. One that is
    done is left as it is.

    Args:
        name: of the model, or "all".
        config: see `load_config`.
        manifest: of the audio.
        run_dir: of the whole set.
        limits: of time.
        parcel: a folder that gets the run to carry away (`parcel.pack`), at each checkpoint.
        report: called with what is going on, as it goes on.

    Returns:
        Whether training is done, rather than stopped.

    Raises:
        ConfigError, CheckpointError, ManifestError: something it needs is missing or broken.
        FloatingPointError: training diverged.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    place = Workplace(
        run_dir,
        manifest,
        checked_config(name, config),
        device,
        lambda what, done, total: report(what, done, total, {}),
    )
    whole = models_of(place.config)
    shares = sum(place.config.get(each, {}).get("share", 0) for each in whole)
    if limits.minutes is not None and shares > 1 + 1e-6:
        raise ConfigError(f"the shares of {config} add up to {shares:.2f}, wanted at most 1")
    if name == "tempo_reader" and name not in whole:
        raise ConfigError(f"{config} has no [semantic] counts_beats = true: nothing takes a tempo")
    # Missing tables and tempi are told before hours of training.
    left = []
    for each in whole if name == "all" else (name,):
        with _entries_as_arguments(each, config):
            if not _is_done(each, place, limits):
                left.append(each)
    if "tempo_reader" in whole and {"tempo_reader", "semantic"} & {*left}:
        for split in ("train", "validation"):
            tempi_of(place.clips(split))
    for each in left:
        with _entries_as_arguments(each, config):
            done = _train_one(each, place, limits, parcel, report)
        if not done:
            return False
    return True


@contextmanager
def _entries_as_arguments(name: str, config: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:  # what the table gives are arguments of the schedule and the model
        raise ConfigError(f"[{name}] of {config} does not fit the model: {error}") from error


def _train_one(
    name: str, place: Workplace, limits: Limits, parcel: Path | None, report: Report
) -> bool:
    torch.manual_seed(place.seed)  # of the first weights; each step has a seed of its own
    if name in FITTED:
        FITTED[name](place)
        if parcel is not None:
            pack(place.run_dir, parcel)
        return True
    schedule = _schedule(table(place.config, name), name, limits.minutes)
    checkpoint = place.run_dir / name / CHECKPOINT
    recipe = RECIPES[name](place)
    left = None if limits.stop_at is None else (limits.stop_at - time.monotonic()) / 60
    progress, packed = 0.0, _written(checkpoint)
    for steps, figures in fit(
        recipe,
        schedule,
        place.run_dir / name,
        seed=place.seed,
        device=place.device,
        minutes=left,
    ):
        progress = figures["train/progress"]
        report(name, steps, round(steps / progress), figures)
        if parcel is not None and progress < 1 and _written(checkpoint) != packed:
            pack(place.run_dir, parcel, unfinished=name)
            packed = _written(checkpoint)
    if parcel is not None and progress == 1:
        pack(place.run_dir, parcel)
    return progress == 1


def _is_done(name: str, place: Workplace, limits: Limits) -> bool:
    settings = table(place.config, name)
    if name in FITTED:
        return place.is_trained(name)  # its description is written last: it is whole
    schedule = _schedule(settings, name, limits.minutes)
    return _progress(place.run_dir / name / CHECKPOINT, schedule) >= 1


def _schedule(settings: dict[str, Any], name: str, minutes: float | None) -> Schedule:
    schedule = Schedule(**{key: settings[key] for key in SCHEDULE if key in settings})
    if minutes is None:
        return schedule
    if not settings["share"]:
        raise ConfigError(f"[{name}] has share = 0: it would have no time to be trained")
    return replace(schedule, minutes=minutes * settings["share"])


def _progress(checkpoint: Path, schedule: Schedule) -> float:
    """How far a training is, without building what it trains."""
    if not checkpoint.exists():
        return 0.0
    try:
        with safe_open(checkpoint, "pt") as tensors:
            counts = {n: float(tensors.get_tensor(n)) for n in COUNTS if n in {*tensors.keys()}}
    except SafetensorError:
        return 0.0  # taking it up will name what is wrong with it
    return schedule.progress(int(counts.get("steps", 0)), counts.get("seconds", 0.0))


def _written(checkpoint: Path) -> int:
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
