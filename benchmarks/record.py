"""Result files: one a device and day, rows appended, written whole.

`runs` holds what is the same for all rows of a command (software, machine, commit); `rows` holds a
line for each case and provider, with a time or the reason why there is none.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.nvml import driver_version
from musiclm_engine.whole_file import whole_file

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

# What a row says of a provider and a case, its `status`
TIMED = "timed"
CANNOT_RUN = "cannot run"
WRONG = "wrong"
ABOVE_ROOF = "above the roof"
RIGHT = "right"  # checked, not meant to be timed
FAILED = "failed"


class Recorder:
    """Appends the rows of one command to a result file; a kill loses at most the row in hand."""

    def __init__(self, path: Path, run: Row):
        self.path = path
        self.run_id = f"{run['started']}-{os.getpid()}"
        self._run = {"run": self.run_id, **run}

    def append(self, rows: list[Row]) -> None:
        """Write rows to the file, behind those of others."""
        content = read(self.path)
        if all(run["run"] != self.run_id for run in content["runs"]):
            content["runs"].append(self._run)
        for row in rows:
            # Each single time would make the files too big to keep: their quantiles stay.
            kept = {name: value for name, value in row.items() if name != "samples_us"}
            content["rows"].append({"run": self.run_id, **kept})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as unfinished:
            unfinished.write_text(_dumps(content))


def recorder_for(device: torch.device, *, commit: str = "", folder: Path = RESULTS) -> Recorder:
    """A recorder into this device's file of today."""
    run = describe_run(device, commit)
    slug = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    return Recorder(folder / f"{slug}-{run['started'][:10]}.json", run)


def read(path: Path) -> dict[str, list[Row]]:
    """A result file's runs and rows; none where there is no file.

    Raises:
        ValueError: the file is no result file.
    """
    if not path.exists():
        return {"runs": [], "rows": []}
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not content.keys() == {"runs", "rows"}:
        raise ValueError(f"{path.name} is no result file: want an object of runs and rows")
    return content


def describe_run(device: torch.device, commit: str = "") -> Row:
    """What a reader needs to judge the figures of a run, or to repeat it."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": _command(),
        "commit": commit or _commit(),
        "device": device_name(device),
        "driver": driver_version(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the CPU's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {_cpu_model()} {threads} thread{'s' if threads > 1 else ''}"


def _command() -> str:
    """As it was typed, but for the machine's own paths."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = module.name.removesuffix(".__main__") if module else Path(sys.argv[0]).name
    arguments = [argument.replace(f"{Path.cwd()}/", "") for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", name, *arguments])


def _commit() -> str:
    """The commit, "-dirty" if files differ from it, "unknown" outside a repository."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _dumps(content: dict[str, list[Row]]) -> str:
    """JSON with a line for each row, so that a diff shows which came."""
    parts = []
    for key, rows in content.items():
        lines = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in rows)
        parts.append(f'  "{key}": [\n{lines}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"
