"""What every suite is made of: a case, the inputs it stands for, and the providers that run it.

A case is data: it says what is computed, never by whom. A provider turns a case and its inputs into
a call; the call returns its results by name, so that what is timed is what was checked.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]


class CannotRun(Exception):
    """A provider does not run a case here; the message is the reason, for the result file."""


@dataclass(frozen=True)
class Work:
    """The least a case needs: each input read once, each output written once."""

    flops: float
    num_bytes: float


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One problem. Subclasses add the shapes; all fields are plain values, for the result file."""

    op: ClassVar[str]
    dtype: str  # of the inputs that the op's main product takes: "bfloat16", "float32", …

    @property
    @abstractmethod
    def name(self) -> str:
        """One line that no other case of the op has."""

    @abstractmethod
    def work(self) -> Work: ...

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def as_row(self) -> dict[str, Any]:
        return {"op": self.op, "case": self.name, **asdict(self)}


C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Provider(Generic[C]):
    """Someone's way to run a case.

    `build` raises CannotRun where it cannot, or whatever its library does. `answers` is the case it computes in truth, where that
    is an easier one ("no bias"): it is then checked and counted as that case, and its row says so.
    """

    name: str
    build: Callable[[C, Tensors], Call]
    answers: Callable[[C], C] = field(default=lambda case: case)


@dataclass(frozen=True)
class Suite(Generic[C]):
    """The cases of one op, everyone who runs them, and what the right results are.

    `plain` computes a case's results in the dtype of its inputs by PyTorch's own operations: from
    float64 inputs it is the definition, from the case's own it shows what that precision costs.
    """

    name: str
    cases: Callable[[str], list[C]]  # by device type
    make_inputs: Callable[[C, torch.device], Tensors]
    plain: Callable[[C, Tensors], Tensors]
    providers: tuple[Provider[C], ...]
    baseline: str  # the provider that the table compares with
    # Cases that a GPU session checks and does not time: sizes around the sides of a tile, options
    checks: Callable[[], list[C]] = list


def to_float64(tensors: Tensors) -> Tensors:
    """The same values, floating point in float64."""
    return {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
