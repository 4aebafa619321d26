"""Finds the judges' packages and the weights inside their wheels, or says how to install them.

basic-pitch and musicnn are used for their weight files alone and never imported: both would import
TensorFlow, and musicnn's requirements (numpy<1.17) fit no current environment, hence `--no-deps`.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WEIGHTS_COMMAND = "pip install --no-deps basic-pitch==0.4.0 musicnn==0.1.0"
LIBRARIES_COMMAND = 'pip install onnxruntime "librosa>=0.11"'


def wheel_folder(package: str) -> Path:
    """The installed folder of `package` (`basic_pitch` or `musicnn`), found without importing it.

    Raises ModuleNotFoundError naming the install command.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the evaluation reads weights from the wheel of {package!r}, which is not installed: "
            f"{WEIGHTS_COMMAND}",
            name=package,
        )
    return Path(spec.submodule_search_locations[0])


def import_library(module: str) -> Any:
    """The module `onnxruntime` or `librosa`.

    Raises ModuleNotFoundError naming the install command.
    """
    if find_spec(module) is None:
        raise ModuleNotFoundError(
            f"the evaluation needs {module!r}, which is not installed: {LIBRARIES_COMMAND}",
            name=module,
        )
    return importlib.import_module(module)
