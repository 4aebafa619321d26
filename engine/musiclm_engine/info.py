"""What `musiclm info` tells."""

import platform
from collections.abc import Iterator
from importlib import resources
from importlib.metadata import PackageNotFoundError, version

from musiclm_kernels import implementations

PACKAGES = ("musiclm-engine", "torch", "triton", "torchaudio", "numpy")


def describe(num_cuda_devices: int) -> Iterator[str]:
    """Lines for a person to read, and to paste into a report."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} is not installed"
    yield f"CUDA devices: {num_cuda_devices}"
    assets = resources.files("musiclm_engine") / "assets"
    weights = []
    if assets.is_dir():
        weights = [file for file in assets.iterdir() if file.name.endswith(".safetensors")]
    size = sum(len(file.read_bytes()) for file in weights)
    yield f"bundled model: {f'{size / 2**20:.1f} MiB' if weights else 'missing'} in {assets}"
    yield "operation: body on CPU, body on CUDA"
    for name, bodies in sorted(implementations().items()):
        yield f"  {name}: {bodies['cpu']}, {bodies['cuda']}"
