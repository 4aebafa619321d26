"""Where a model set is trained, and what the recipes of its models share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musiclm_engine.checkpoint import CheckpointError
from musiclm_engine.components import load_component
from musiclm_engine.data.manifest import Clip, load_manifest
from musiclm_engine.training.clip_bank import ClipBank, open_bank
from musiclm_engine.training.clips import Crops

VALIDATION_BATCHES = 4

Progress = Callable[[str, int, int], None]  # of what, how many are done, of how many


@dataclass(frozen=True)
class Workplace:
    """Where a model set is being trained.

    Attributes:
        run_dir: holds a folder for each model, and the token caches.
        manifest: of the audio.
        config: as `load_config` gives it.
        device: to train on.
        progress: told how far the work before training is.
    """

    run_dir: Path
    manifest: Path
    config: dict[str, Any]
    device: torch.device
    progress: Progress = lambda what, done, total: None
    _clips: dict[str, list[Clip]] = field(default_factory=dict, init=False, repr=False)
    _banks: dict[tuple[str, int], ClipBank] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    def is_trained(self, name: str) -> bool:
        """Whether others can load it: all of it is there."""
        return (self.run_dir / name / "model.json").exists()

    def trained(self, name: str) -> Any:
        """A model that was trained here before.

        Raises:
            CheckpointError: it was not.
        """
        folder = self.run_dir / name
        if not self.is_trained(name):
            raise CheckpointError(f"{folder} has no {name} yet: run `musiclm train {name}`")
        kind = "tokenizer" if name == "semantic_encoder" else name  # it becomes one when fitted
        return load_component(kind, folder / "model").to(self.device)

    def clips(self, split: str) -> list[Clip]:
        if split not in self._clips:
            self._clips[split] = load_manifest(self.manifest, split)
        return self._clips[split]

    def bank(self, split: str, sample_rate_hz: int) -> ClipBank:
        """The audio of a split, on the device; its samples lie in a file beside the manifest."""
        key = split, sample_rate_hz
        if key not in self._banks:
            path = self.manifest.with_name(f"{self.manifest.stem}.{split}.{sample_rate_hz}.pcm")
            bank = open_bank(
                self.clips(split),
                path,
                sample_rate_hz,
                lambda done, total: self.progress("audio", done, total),
            )
            self._banks[key] = bank.to(self.device)
        return self._banks[key]

    def crops(self, settings: dict[str, Any], sample_rate_hz: int, split: str) -> Crops:
        return Crops(
            self.bank(split, sample_rate_hz),
            self.clips(split),
            settings["crop_seconds"],
            settings["batch_size"],
            self.seed,
        )


def compiled(function: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """function as torch.compile makes it, where the settings say `compile = true`."""
    return torch.compile(function) if settings.get("compile", False) else function


def mean_losses(losses: Callable[[int], dict[str, Tensor]]) -> dict[str, float]:
    """The figures of validation: each loss, over the first `VALIDATION_BATCHES` batches."""
    batches = [losses(step) for step in range(VALIDATION_BATCHES)]
    return {name: sum(b[name].item() for b in batches) / len(batches) for name in batches[0]}
