"""Other people's packages, imported where they are installed; a reason where they are not.

musiclm-pytorch imports far more than its audio tower needs: audiolm-pytorch with a T5, a HuBERT and
a logger, x-clip with an image transformer; several have no release for current Python. All of its
code that is timed here stands in its own module and reaches none of them. So they are stand-ins for
the time of its import, installed or not: modules without content, whose classes do nothing. It
needs `pip install --no-deps musiclm-pytorch beartype`, and runs as it does for its users.
The transformers of audiolm-pytorch are taken in the same way, after
`pip install --no-deps audiolm-pytorch==2.4.0 hyper-connections==0.3.8 beartype`.
"""

import importlib
import importlib.abc
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from benchmarks.case import CannotRun

# What musiclm-pytorch imports for its trainers, its text tower's tokenizer and its quantiser.
STAND_INS = frozenset(
    ("accelerate", "audiolm_pytorch", "lion_pytorch", "vector_quantize_pytorch", "x_clip")
)
# What audiolm-pytorch imports for its codec, its trainers, HuBERT, T5 and progress bars.
# fmt: off
AUDIOLM_STAND_INS = frozenset((
    "accelerate", "ema_pytorch", "encodec", "fairseq", "gateloop_transformer", "joblib",
    "lion_pytorch", "local_attention", "pytorch_warmup", "sklearn", "torchaudio", "tqdm",
    "transformers", "vector_quantize_pytorch", "wandb",
))
# fmt: on
T5_WIDTH = 768  # of google/t5-v1_1-base, whose configuration audiolm-pytorch asks a server for


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

    with _stand_ins(STAND_INS):
        _ = _torchaudio.transforms
        return importlib.import_module("musiclm_pytorch")


@cache
def audiolm_pytorch() -> ModuleType:
    """The installed audiolm_pytorch. Only its three transformers work in this process from here on,
    conditioned on embeddings.

    Raises:
        CannotRun: it is not installed, or does not import.
    """
    for name in ("audiolm_pytorch", "hyper_connections"):
        if importlib.util.find_spec(name) is None:
            raise CannotRun(f"not importable: {name} is not installed")
    warn, level = warnings.warn, logging.root.level  # its import switches both off
    try:
        with _stand_ins(AUDIOLM_STAND_INS):
            package = importlib.import_module("audiolm_pytorch")
    finally:
        warnings.warn = warn
        logging.root.setLevel(level)
    package.audiolm_pytorch.get_encoded_dim = lambda name: T5_WIDTH
    return package


@contextmanager
def _stand_ins(names: frozenset[str]) -> Iterator[None]:
    """Within: these packages are imported as stand-ins, where they are not imported already."""
    finder = _StandInFinder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
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
    def __init__(self, names: frozenset[str]):
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._names:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
