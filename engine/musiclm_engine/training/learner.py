"""A module that learns: its optimisers, its share of a step, and what a checkpoint holds of it.

Weights of linear layers are moved by Muon (Jordan et al., 2024), whose steps have all singular
values equal, scaled to the size of AdamW's (Liu et al., arXiv 2502.16982, section 2.2); all else,
embeddings and output heads too, is moved by AdamW at the same rate.
"""

from typing import Any

import torch
from torch import Tensor, nn

from musiclm_engine.training.schedule import Schedule

SMALLEST_SIDE = 16  # of a matrix that Muon moves: below it there is no direction to favour


class Learner:
    """One of the modules that a training moves.

    Attributes:
        prefix: of its loss, its figures and its tensors, which tells them from another's.
        model: what learns.
        rate: its learning rate, in those of the schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        prefix: str = "",
        betas: tuple[float, float] = (0.9, 0.95),
        rate: float = 1.0,
    ) -> None:
        self.prefix = prefix
        self.model = model
        self.rate = rate
        self.trained = [p for p in model.parameters() if p.requires_grad]
        linear = [
            layer.weight
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
            and layer.weight.requires_grad
            and min(layer.weight.shape) >= SMALLEST_SIDE
        ]
        of_muon = {id(weight) for weight in linear}
        rest = [p for p in self.trained if id(p) not in of_muon]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": schedule.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, betas=betas, fused=True)
        ]
        if linear:
            self.optimizers.append(
                torch.optim.Muon(
                    linear,
                    weight_decay=schedule.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def loss_name(self) -> str:
        return f"{self.prefix}loss"

    @property
    def norm_name(self) -> str:
        return f"{self.prefix}gradient_norm"

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments, by names that no other learner has."""
        tensors = {f"{self.prefix}model/{k}": v for k, v in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                place = f"{self.prefix}optimizer/{number}.{index}"
                tensors |= {f"{place}/{k}": v for k, v in state.items()}
        return tensors

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take up what `tensors` gave, without the first part of the names.

        Raises:
            RuntimeError: weights of another model, or moments of other optimisers.
        """
        self.model.load_state_dict(weights)
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for key, value in moments.items():
            place, _, name = key.partition("/")
            number, dot, index = place.partition(".")
            if not dot or int(number) >= len(states):
                raise RuntimeError(f"moments {place} belong to another optimiser")
            states[int(number)].setdefault(int(index), {})[name] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def descend(
    learners: list[Learner], losses: dict[str, Tensor], *, rate: float, clip: float
) -> dict[str, Tensor]:
    """Move every learner down its own loss, all from where they now stand.

    Returns:
        The norm of each gradient before it was clipped, by `Learner.norm_name`.
    """
    norms = {}
    for learner in reversed(learners):
        for optimizer in learner.optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses[learner.loss_name].backward(
            # Of a model and its adversary, each loss passes through both and is for one. The
            # model's comes last, so that nothing of the model itself is retained.
            inputs=learner.trained if len(learners) > 1 else None,
            retain_graph=learner is not learners[0],
        )
        norms[learner.norm_name] = nn.utils.clip_grad_norm_(learner.model.parameters(), clip)
    for learner in learners:
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * learner.rate
            optimizer.step()
    return norms
