"""What one compiled kernel costs, read from its machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from triton import knobs
from triton.compiler import CompiledKernel

from benchmarks.offline.loops import Instruction, loops
from benchmarks.offline.occupancy import SYSTEM_SHARED_BYTES, ctas_per_sm

# Of products in half precision and TF32, in 8-bit floats, in integers, in binary and in fp64.
TENSOR_CORE_OPCODES = frozenset(
    {"HMMA", "QMMA", "OMMA", "IMMA", "BMMA", "DMMA"}  # mma.sync
    | {"HGMMA", "QGMMA", "IGMMA", "BGMMA"}  # wgmma, sm_90
    | {"UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCIMMA"}  # tcgen05, sm_100
)
# What else a loop's time goes to.
LISTED_OPCODES = TENSOR_CORE_OPCODES.union(
    ("MUFU", "SHFL", "BAR"),  # exp and its like; exchange within a warp; barriers of a CTA
    ("LDS", "LDSM", "STS", "STSM", "ATOMS"),  # shared memory
    ("LDGSTS", "UTMALDG", "UTMASTG"),  # cp.async; TMA
    ("LDTM", "STTM"),  # tensor memory
    ("LDG", "STG", "RED", "REDG", "ATOM", "ATOMG"),  # global memory
    ("LDL", "STL"),  # local memory: spills
)

_RESOURCES = r"Function {}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_FLOAT_ATOMIC = re.compile(
    r"\b(?:atom|red)\.\S*\.b?f(?:16|16x2|32|64)\b|\bcp\.reduce\.async\.bulk\b", re.ASCII
)
_ASYNC_GATHER = re.compile(r"async_copy_global_to_local .*: tensor<\d+x\d+x!tt\.ptr<f32>")
_FUSED_ADD = re.compile(r"\bfma\.rn(?:\.ftz)?\.f32\b", re.ASCII)
GRID_WAIT = "ACQBULK"  # griddepcontrol.wait: here a kernel waits for those before it
_SCALAR_DOT = re.compile(r"\btt\.dot .*parent = #blocked")


@dataclass(frozen=True)
class Figures:
    """Costs of a compiled kernel, the same on every run of the same compiler.

    Attributes:
        registers: per thread.
        shared_bytes: static and dynamic shared memory of a CTA.
        spill_bytes: local memory of a thread.
        ctas_per_sm: CTAs one multiprocessor holds; 0 if it holds none.
        instructions: of the whole kernel.
        loop_instructions: of each of its main loops, in the order of the code.
        loop_opcodes: how often each of LISTED_OPCODES stands in each of them.
        tensor_cores: tensor-core opcodes of the whole kernel.
        scalar_dots: `tl.dot` that became scalar arithmetic.
        float_atomics: floating-point atomics in the PTX, bulk reductions among them.
        async_gathers: `cp.async` of two-dimensional tiles of fp32, in a kernel of narrower inputs
            entries of a table that are fetched one by one.
        fused_adds: fp32 multiply-adds of one rounding, in the PTX.
        grid_waits: where it waits for the kernel before it (programmatic dependent launch).
        loads_ahead: loads from global memory that stand in the code before the first such wait.
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    ctas_per_sm: int
    instructions: int
    loop_instructions: list[int]
    loop_opcodes: list[dict[str, int]]
    tensor_cores: dict[str, int]
    scalar_dots: int
    float_atomics: int
    async_gathers: int
    fused_adds: int
    grid_waits: int
    loads_ahead: int


def read(kernel: CompiledKernel, arch: int) -> Figures:
    """Read the figures of a kernel compiled for compute capability arch."""
    listing = _disassemble(kernel.asm["cubin"])
    resources = re.search(_RESOURCES.format(re.escape(kernel.metadata.name)), listing)
    assert resources, "cuobjdump lists no resources of the kernel"
    registers, stack, static_shared, local = map(int, resources.groups())
    if arch >= 90 and static_shared:  # where the listing has the system's part in it
        static_shared -= SYSTEM_SHARED_BYTES
    shared = static_shared + kernel.metadata.shared
    functions = [parse(text) for text in listing.split("Function : ")[1:]]
    code = [instruction for function in functions for instruction in function]
    names = [instruction.name for instruction in code if not instruction.never]
    ahead = names[: names.index(GRID_WAIT)] if GRID_WAIT in names else []
    main = [loop for function in functions for loop in main_loops(loops(function))]
    return Figures(
        registers=registers,
        shared_bytes=shared,
        spill_bytes=stack + local,
        ctas_per_sm=ctas_per_sm(
            arch,
            registers=registers,
            shared_bytes=shared,
            num_warps=kernel.metadata.num_warps,
            tensor_memory_columns=kernel.metadata.tmem_size or 0,
        ),
        instructions=len(code),
        loop_instructions=[len(loop) for loop in main],
        loop_opcodes=[_count(loop, LISTED_OPCODES) for loop in main],
        tensor_cores=_count(code, TENSOR_CORE_OPCODES),
        scalar_dots=len(_SCALAR_DOT.findall(kernel.asm["ttgir"])),
        float_atomics=len(_FLOAT_ATOMIC.findall(kernel.asm["ptx"])),
        async_gathers=len(_ASYNC_GATHER.findall(kernel.asm["ttgir"])),
        fused_adds=len(_FUSED_ADD.findall(kernel.asm["ptx"])),
        grid_waits=names.count(GRID_WAIT),
        loads_ahead=ahead.count("LDG"),
    )


def parse(listing: str) -> list[Instruction]:
    """The instructions of one function as cuobjdump -sass lists them."""
    code = []
    for address, predicate, opcode, operands in _INSTRUCTION.findall(listing):
        target = None
        conditional = bool(predicate)
        if opcode.split(".")[0] == "BRA":
            *conditions, where = re.split(r"[,\s]+", operands.strip())
            target = int(where, 16)
            conditional |= bool(conditions)
        code.append(
            Instruction(int(address, 16), opcode, conditional, predicate in ("!PT", "!UPT"), target)
        )
    return code


def main_loops(found: list[list[Instruction]]) -> list[list[Instruction]]:
    """Of a function's loops, those its time goes to.

    These are the innermost loops with a tensor-core instruction: one for each way through its work.
    Without any such loop, it is the largest.
    """
    products = {
        frozenset(instruction.address for instruction in loop): loop
        for loop in found
        if _count(loop, TENSOR_CORE_OPCODES)
    }
    innermost = [
        loop
        for addresses, loop in products.items()
        if not any(inner < addresses for inner in products)
    ]
    return innermost or sorted(found, key=len)[-1:]


def _count(code: list[Instruction], names: Iterable[str]) -> dict[str, int]:
    counts = Counter(instruction.name for instruction in code if not instruction.never)
    return {name: counts[name] for name in sorted(names) if counts[name]}


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
