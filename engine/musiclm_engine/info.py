"""What `musiclm info` tells."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from musiclm_engine.musiclm import DESCRIPTION, model_folder
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
    folder = model_folder(None)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    whole = (folder / DESCRIPTION).exists()  # written last
    yield f"bundled model: {f'{size / 2**20:.1f} MiB' if whole else 'missing'} in {folder}"
    yield "operation: body on CPU, body on CUDA"
    for name, bodies in sorted(implementations().items()):
        yield f"  {name}: {bodies['cpu']}, {bodies['cuda']}"
