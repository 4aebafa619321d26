"""How many programs run at once on one multiprocessor.

Source: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""

SHARED_BYTES_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SYSTEM_SHARED_BYTES = 1024  # taken by the system from each CTA's share
SHARED_UNIT_BYTES = 128
REGISTERS_PER_QUARTER = 16384  # a multiprocessor's four schedulers have their own
REGISTER_UNIT = 256  # registers are given to a warp in these units
MAX_WARPS_PER_SM = 64
MAX_CTAS_PER_SM = 32
TENSOR_MEMORY_COLUMNS = 512  # sm_100: what a CTA's accumulators are taken from


def ctas_per_sm(
    arch: int, *, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0
) -> int:
    """CTAs that fit one multiprocessor of compute capability arch; 0: it cannot be launched.

    Args:
        arch: 80, 90 or 100.
        registers: per thread.
        shared_bytes: static and dynamic shared memory of a CTA, without the system's part.
        num_warps: of a CTA.
        tensor_memory_columns: of a CTA.
    """
    shared = _round_up(shared_bytes + SYSTEM_SHARED_BYTES, SHARED_UNIT_BYTES)
    warp_registers = _round_up(registers * 32, REGISTER_UNIT)
    limits = [
        4 * (REGISTERS_PER_QUARTER // warp_registers) // num_warps,
        SHARED_BYTES_PER_SM[arch] // shared,
        MAX_WARPS_PER_SM // num_warps,
        MAX_CTAS_PER_SM,
    ]
    if tensor_memory_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory_columns)
    return min(limits)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
