"""Files that are whole or as they were."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, moved to `path` when the block ends well.

    Whatever fails, the file that was at `path` stays and nothing half-written is left. Each call has
    a name of its own, so that two processes may write the same file: the later one stays.

    Raises:
        OSError: the folder is missing or not writable, at once.
    """
    # The suffix stays: some writers choose their format by it.
    unfinished = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    open(unfinished, "xb").close()
    mode = unfinished.stat().st_mode
    try:
        yield unfinished
        unfinished.chmod(mode)  # safetensors makes its files private
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
