"""Results kept on disk under what they depend on, so that a command cut short goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from musiclm_engine.checkpoint import read_json, write_json


class WorkFolder:
    """A folder of results, each whole or not there; several processes may fill it together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stem(self, kind: str, *key: str | float) -> Path:
        """Where results of this kind and key belong: a path without suffix, its folder made."""
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        (self.folder / kind).mkdir(parents=True, exist_ok=True)
        return self.folder / kind / name

    def kept(self, kind: str, *key: str | float, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, now or in an earlier run, as JSON holds it."""
        path = self.stem(kind, *key).with_suffix(".json")
        if not path.exists():
            write_json(path, compute())
        return read_json(path)


def file_sha256(path: Path) -> str:
    """Of the bytes in a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
