"""What has to be right before anything is timed.

A result's error is its distance from the float64 definition. It may be at most twice what plain
PyTorch errs in the case's own precision on the same inputs: the budget is computed, not chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Tensors

ERROR_FACTOR = 2.0  # on the relative error of a whole result
# On its worst element: a maximum over millions of roundings varies more than their mean does. One
# wrong row of many hides in the first measure and stands out in this one a hundredfold.
WORST_FACTOR = 4.0
# Below this, relative errors of float32 are luck, the yardstick's too: the bias of a layer in an MLP
# that makes attention biases has a gradient of which almost nothing is left, since the gradients of
# a softmax sum to zero in each row. TF32 would err by 3e-4.
RELATIVE_NOISE = 1e-5


@dataclass(frozen=True)
class Error:
    """Of one result: relative (||x - truth|| / ||truth||), and its worst element over the root mean
    square of the truth; each beside its budget."""

    relative: float
    budget: float
    worst: float
    worst_budget: float

    @property
    def passes(self) -> bool:
        return self.relative <= self.budget and self.worst <= self.worst_budget  # NaN never does


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a provider's results; `failure` is empty where it passed."""

    errors: dict[str, Error]
    failure: str

    @property
    def passed(self) -> bool:
        return not self.failure

    def as_row(self) -> dict[str, list[float]]:
        """Relative error and budget of each result; NaN, which is no JSON, only where it failed."""
        return {
            name: [float(f"{error.relative:.3g}"), float(f"{error.budget:.3g}")]
            for name, error in self.errors.items()
        }

    @property
    def share_of_budget(self) -> float:
        """The largest error as a share of its budget."""
        return max((e.relative / e.budget for e in self.errors.values()), default=float("nan"))


def judge(
    results: Tensors, truth: Tensors, yardstick: Tensors, *, noise: float = RELATIVE_NOISE
) -> Verdict:
    """Compare results with the truth.

    Args:
        results: what a provider computed, by name.
        truth: the same by the definition, float64.
        yardstick: the same by plain PyTorch in the case's own precision.
        noise: the least budget for a relative error.
    """
    if results.keys() != truth.keys():
        return Verdict({}, f"results are {sorted(results)}, want {sorted(truth)}")
    for name, result in results.items():
        if result.shape != truth[name].shape:
            return Verdict({}, f"{name} is {tuple(result.shape)}, want {tuple(truth[name].shape)}")
    errors = {name: _error(results[name], truth[name], yardstick[name], noise) for name in truth}
    failures = [
        f"{name} errs {e.relative:.2e} (budget {e.budget:.2e}), "
        f"worst {e.worst:.2e} (budget {e.worst_budget:.2e})"
        for name, e in errors.items()
        if not e.passes
    ]
    return Verdict(errors, "; ".join(failures))


def _error(result: Tensor, truth: Tensor, yardstick: Tensor, noise: float) -> Error:
    relative, worst = _distance(result, truth)
    yardstick_relative, yardstick_worst = _distance(yardstick, truth)
    return Error(
        relative=relative,
        budget=max(ERROR_FACTOR * yardstick_relative, noise),
        worst=worst,
        worst_budget=WORST_FACTOR * max(yardstick_worst, noise),
    )


def _distance(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative to the truth; to 1 where the truth is zero but for its own roundings."""
    truth = truth.double()
    difference = result.detach().to(truth.device, torch.float64) - truth
    scale = float(truth.square().mean().sqrt())
    if scale < 1e-12:
        scale = 1.0
    root_mean_square = float(difference.square().mean().sqrt())
    return root_mean_square / scale, float(difference.abs().amax()) / scale
