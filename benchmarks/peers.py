"""Other people's packages, imported where they are installed; a reason where they are not.

musiclm-pytorch imports far more than its audio tower needs: audiolm-pytorch with a T5, a HuBERT and
a logger, x-clip with an image transformer; several have no release for current Python. All of its
code that is timed here stands in its own module and reaches none of them. So they are stand-ins for
the time of its import, installed or not: modules without content, whose classes do nothing. It
needs `pip install --no-deps musiclm-pytorch beartype`, and runs as it does for its users.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from benchmarks.case import CannotRun

# What musiclm-pytorch imports for its trainers, its text tower's tokenizer and its quantiser.
STAND_INS = frozenset(
    ("accelerate", "audiolm_pytorch", "lion_pytorch", "vector_quantize_pytorch", "x_clip")
)


@cache
def musiclm_pytorch() -> ModuleType:
    """The installed musiclm_pytorch. Only its towers work in this process from here on.

    Raises:
        CannotRun: it is not installed, or does not import.
    """
    if importlib.util.find_spec("musiclm_pytorch") is None:
        raise CannotRun("not importable: musiclm_pytorch is not installed")
    # The engine's way to import torchaudio beside a torch that its extension was not built for.
    from musiclm_engine.audio import _torchaudio

    finder = _StandInFinder()
    sys.meta_path.insert(0, finder)
    try:
        _ = _torchaudio.transforms
        return importlib.import_module("musiclm_pytorch")
    except Exception as error:  # third-party code: any of them means the same here
        raise CannotRun(f"not importable: {type(error).__name__}: {error}") from error
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]  # nobody else takes it for the package


def import_peer(name: str) -> ModuleType:
    """A package by name.

    Raises:
        CannotRun: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # an extension built for another torch fails in many ways
        raise CannotRun(f"not importable: {type(error).__name__}: {error}") from error


class _Nothing(type):
    """The class of classes whose attributes are such classes again."""

    def __getattr__(cls, name: str) -> Any:
        return _nothing(name)


def _nothing(name: str) -> type:
    """A class that takes any arguments and can be inherited from."""
    if name.startswith("__"):  # what is asked for to find out what a thing is
        raise AttributeError(name)
    return _Nothing(name, (), {"__init__": lambda *_arguments, **_options: None})


class _StandIn(ModuleType):
    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []  # it has submodules, whichever are asked for

    def __getattr__(self, name: str) -> Any:
        return _nothing(name)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in STAND_INS:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
