"""What a launcher launches, recorded instead of run, and compiled for a GPU that is not there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton function.

    Attributes:
        function: the function launched.
        arguments: the value of each parameter by name, constexprs and defaults included.
        options: num_warps, num_stages and whatever else is the compiler's.
        grid: programs along each axis.
    """

    function: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def constexprs(self) -> dict[str, Any]:
        """The arguments that are constants of the compiled kernel."""
        parameters = self.function.params
        return {p.name: self.arguments[p.name] for p in parameters if p.is_constexpr}


def record(launcher: Callable[[], object], arch: int) -> list[Launch]:
    """Call launcher; return in order what it would have launched on a GPU of compute capability arch.

    Nothing is compiled or launched. Tensors on "meta" count as aligned to 16 bytes, and a slice of
    one as aligned to what its offset allows. A launcher that asks Triton for the target is told arch.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, or the launch is autotuned, which needs a GPU.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: unset it, interpreted functions do not compile"
        )
    launches: list[Launch] = []

    def instead_of_run(
        function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any
    ) -> None:
        parameters = function.signature.parameters
        options = {key: value for key, value in keywords.items() if key not in parameters}
        named = {key: value for key, value in keywords.items() if key in parameters}
        bound = function.signature.bind(*arguments, **named)
        bound.apply_defaults()
        programs = grid(bound.arguments) if callable(grid) else grid
        launches.append(Launch(function, dict(bound.arguments), options, tuple(programs)))

    with _target(arch), mock.patch.object(JITFunction, "run", instead_of_run):
        launcher()
    return launches


def compile_for(launch: Launch, arch: int) -> CompiledKernel:
    """Compile a launch as Triton does on a GPU of compute capability arch, through its cache."""
    with _target(arch):
        return launch.function.warmup(
            *launch.arguments.values(), grid=launch.grid, **launch.options
        )


@contextmanager
def _target(arch: int) -> Iterator[None]:
    with mock.patch.object(driver, "_active", _AbsentGPU(arch)):
        yield


class _AbsentGPU:
    """As much of Triton's driver as the way from a call to its machine code asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a function keeps what it compiled by device, whatever the target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., Any]:
        raise RuntimeError("an autotuned kernel needs a GPU: give it one configuration by shape")
