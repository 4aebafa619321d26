"""torchaudio where its compiled extension cannot load.

PyPI's torchaudio wheel links against a CUDA torch, so beside a CPU-only torch (or one of another
version) `import torchaudio` fails, although its Python part needs nothing compiled. Read
`functional` and `transforms` from this module: they are imported on first use, unchanged where
torchaudio works, and without the extension where it does not.
"""

import importlib
import sys
import threading
import types
from typing import Any

_lock = threading.Lock()


def __getattr__(name: str) -> Any:
    if name not in ("functional", "transforms"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _lock:
        _import_torchaudio()
        return importlib.import_module(f"torchaudio.{name}")


def _import_torchaudio() -> None:
    before = set(sys.modules)
    try:
        importlib.import_module("torchaudio")
    except ModuleNotFoundError:
        raise  # not installed at all: the plain message says so
    except (ImportError, OSError, RuntimeError):
        # A failed import leaves the submodules it reached; they must be imported afresh.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchaudio":
                del sys.modules[name]
        stub = _extension_stub()
        sys.modules[stub.__name__] = stub
        try:
            importlib.import_module("torchaudio")
        except BaseException:
            sys.modules.pop(stub.__name__, None)
            raise


def _extension_stub() -> types.ModuleType:
    """What torchaudio's Python part reads from its extension module, all of it absent."""

    def fail_if_no_align(function: Any) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"torchaudio's {function.__name__} needs its compiled extension, which does not "
                "load beside this torch; install the torchaudio build that matches torch"
            )

        return refuse

    stub = types.ModuleType("torchaudio._extension")
    stub.__dict__.update(_IS_TORCHAUDIO_EXT_AVAILABLE=False, fail_if_no_align=fail_if_no_align)
    return stub
