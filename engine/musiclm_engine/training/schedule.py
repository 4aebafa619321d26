"""How long a model is trained, in steps or in minutes, and how fast it learns meanwhile."""

import math
from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. Training ends with its steps or its minutes, whichever are first.

    Attributes:
        steps: in all.
        learning_rate: at its plateau, after `warmup` steps and before the last quarter of the
            training, over which it falls to nothing.
        warmup: steps of linear rise.
        weight_decay: of matrices.
        clip: largest norm of a gradient.
        validate_every: steps.
        save_every_seconds: of training.
        precision: "fp32", or "bf16" for matrix products rounded to bfloat16 (autocast).
        minutes: in all, those before an interruption too.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    validate_every: int = 250
    save_every_seconds: float = 120.0
    precision: str = "fp32"
    minutes: float = math.inf

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, wanted a whole number of at least 1")
        for name in ("learning_rate", "warmup", "weight_decay", "clip", "save_every_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}, wanted a number from 0 up")
        if not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes!r}, wanted more than 0")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}, wanted one of {', '.join(PRECISIONS)}"
            )

    def progress(self, steps: int, seconds: float) -> float:
        """How much of the training is done after so many steps and seconds, 1 at its end."""
        return max(steps / self.steps, seconds / (60 * self.minutes))

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of a step that begins after so many seconds."""
        left = 1 - self.progress(step, seconds)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), left / 0.25)
