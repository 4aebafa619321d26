"""The least time a case can take on a device, from what it must compute and move.

The rates are measured ceilings, not datasheets: a copy of gigabytes, and an 8192-cubed matrix
product on random data, on one machine of each kind with torch 2.11.0 and CUDA 13.0.
"""

from dataclasses import dataclass

from benchmarks.case import Case, Work

# A measured ceiling is no law: copies differ by some per cent from run to run.
ROOF_MARGIN = 1.05


@dataclass(frozen=True)
class Roof:
    bytes_per_s: float
    flops_per_s: dict[str, float]


# float32 at half the bf16 rate is what TF32 reaches at best; the plain units are slower.
_ROOFS = {
    "H100": Roof(3.0e12, {"bfloat16": 800e12, "float16": 800e12, "float32": 400e12}),
    "H200": Roof(4.3e12, {"bfloat16": 800e12, "float16": 800e12, "float32": 400e12}),
}


def roof_of(device_name: str) -> Roof | None:
    """The roof of a device, None where none was measured: every CPU, other GPUs."""
    return next((roof for name, roof in _ROOFS.items() if name in device_name), None)


def floor_us(case: Case, roof: Roof | None) -> float | None:
    """The least microseconds the case can take, None without a roof for it."""
    if roof is None or case.dtype not in roof.flops_per_s:
        return None
    work: Work = case.work()
    return 1e6 * max(work.flops / roof.flops_per_s[case.dtype], work.num_bytes / roof.bytes_per_s)


def above_roof(time_us: float, floor: float | None) -> str:
    """Why a time cannot be true, or nothing."""
    if floor is None or time_us * ROOF_MARGIN >= floor:
        return ""
    return (
        f"above the roof: {time_us:.2f} us where {floor:.2f} us is the floor: something is skipped"
    )
