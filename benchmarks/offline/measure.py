"""Records, compiles and reads the variants, several at a time."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module

from benchmarks.offline import cubin, record
from benchmarks.offline.promises import Variant


@dataclass(frozen=True)
class Measurement:
    """A variant on one architecture.

    Attributes:
        name: the variant's.
        arch: what it was compiled for.
        kernels: figures by kernel; a second launch of the same function is called "name 2".
        seconds: recording, compiling and reading, or fetching from Triton's cache and reading.
        error: why there are no figures.
    """

    name: str
    arch: int
    kernels: dict[str, cubin.Figures] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


def load_variants(source: str) -> list[Variant]:
    """The variants of "module:list".

    Raises:
        ValueError: two of them have the same name.
    """
    module, name = source.split(":")
    variants = getattr(import_module(module), name)
    names = [variant.name for variant in variants]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{source} holds more than one variant of the name {', '.join(repeated)}")
    return variants


def measure(variant: Variant, arch: int) -> Measurement:
    """Compile all that a variant launches on arch, and read it. An exception becomes an error."""
    begun = time.perf_counter()
    kernels: dict[str, cubin.Figures] = {}
    try:
        for launch in record.record(variant.launch, arch):
            name = launch.function.__name__
            same = sum(known.split()[0] == name for known in kernels)
            figures = cubin.read(record.compile_for(launch, arch), arch)
            kernels[f"{name} {same + 1}" if same else name] = figures
    except Exception as error:  # noqa: BLE001 - whatever a launcher or the compiler raises
        reason = f"{type(error).__name__}: {error}"
        return Measurement(variant.name, arch, {}, time.perf_counter() - begun, reason)
    return Measurement(variant.name, arch, kernels, time.perf_counter() - begun)


def measure_all(source: str, tasks: list[tuple[str, int]], jobs: int) -> Iterator[Measurement]:
    """Measure (variant's name, arch) of the list `source` names, in the order they are ready.

    Each of the `jobs` processes imports the list itself: a launch is a function, not data.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        futures = [pool.submit(_measure_named, source, name, arch) for name, arch in tasks]
        for future in as_completed(futures):
            yield future.result()


def _measure_named(source: str, name: str, arch: int) -> Measurement:
    variant = next(variant for variant in load_variants(source) if variant.name == name)
    return measure(variant, arch)
