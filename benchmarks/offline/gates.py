"""What is held against a compiled kernel: its promises, and the budget it had when last accepted."""

from benchmarks.offline.cubin import TENSOR_CORE_OPCODES, Figures
from benchmarks.offline.promises import Promises, Variant

DEPENDENT_LAUNCHES = 90  # the first compute capability with programmatic dependent launch
LOOP_SLACK = 0.05  # of a main loop's instructions: what scheduling alone may move


def violations(
    variant: Variant, arch: int, kernels: dict[str, Figures], budget: dict[str, Figures] | None
) -> dict[str, list[str]]:
    """All that is wrong with what a variant launches, by kernel; under "" what is of the variant.

    Args:
        variant: with its promises.
        arch: what it was compiled for.
        kernels: the figures of each kernel it launches.
        budget: theirs; None leaves the budget out, {} says that there is none yet.
    """
    found = {kernel: broken_promises(variant.promises, arch, kernels[kernel]) for kernel in kernels}
    whole = found.setdefault("", [])
    opcode = (variant.promises.tensor_cores or {}).get(arch)
    if not kernels:
        whole.append("launches nothing")
    elif opcode and not any(opcode in figures.tensor_cores for figures in kernels.values()):
        whole.append(f"no kernel has a {opcode}")
    if budget is not None:
        for kernel, figures in kernels.items():
            if kernel in budget:
                found[kernel] += over_budget(figures, budget[kernel])
            else:
                found[kernel].append("has no budget")
        whole += [f"does not launch {kernel} any more" for kernel in budget.keys() - kernels.keys()]
    return {kernel: reasons for kernel, reasons in found.items() if reasons}


def broken_promises(promises: Promises, arch: int, figures: Figures) -> list[str]:
    """What does not hold of a kernel compiled for arch, one sentence each."""
    found = []
    if figures.spill_bytes > promises.max_spill_bytes:
        found.append(f"spills {figures.spill_bytes} bytes, {promises.max_spill_bytes} are allowed")
    if figures.ctas_per_sm == 0:
        found.append(f"cannot be launched: a CTA takes more than a multiprocessor of sm_{arch} has")
    if promises.no_float_atomics and figures.float_atomics:
        found.append(f"has {figures.float_atomics} floating-point atomics, promises none")
    if promises.no_async_gathers and figures.async_gathers:
        found.append(f"has {figures.async_gathers} cp.async of a table's entries, promises none")
    if promises.no_fused_adds and figures.fused_adds:
        found.append(f"has {figures.fused_adds} fused multiply-adds, promises none")
    if promises.prefetches and arch >= DEPENDENT_LAUNCHES and not figures.grid_waits:
        found.append("does not wait for the kernel before it, promises to")
    if promises.prefetches and arch >= DEPENDENT_LAUNCHES and not figures.loads_ahead:
        found.append("loads nothing before it waits, promises to")
    opcode = (promises.tensor_cores or {}).get(arch)
    if opcode is not None:
        others = sorted(figures.tensor_cores.keys() & (TENSOR_CORE_OPCODES - {opcode}))
        if others:
            found.append(f"multiplies with {', '.join(others)}, promises {opcode}")
        if figures.scalar_dots:
            found.append(f"has {figures.scalar_dots} scalar dots, promises {opcode}")
    return found


def over_budget(figures: Figures, budget: Figures) -> list[str]:
    """Where a kernel costs more than its budget, one sentence each."""
    found = [
        f"{name} {getattr(figures, name)} over {getattr(budget, name)}"
        for name in ("registers", "shared_bytes")
        if getattr(figures, name) > getattr(budget, name)
    ]
    if figures.ctas_per_sm < budget.ctas_per_sm:
        found.append(f"ctas_per_sm {figures.ctas_per_sm} under {budget.ctas_per_sm}")
    now, then = figures.loop_instructions, budget.loop_instructions
    if len(now) != len(then):
        found.append(f"main loops of {now} instructions, not of {then}")
    elif any(
        size > int(accepted * (1 + LOOP_SLACK)) for size, accepted in zip(now, then, strict=True)
    ):
        found.append(f"main loops of {now} instructions, over {then} + {LOOP_SLACK:.0%}")
    return found
