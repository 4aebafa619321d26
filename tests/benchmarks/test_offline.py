"""The offline proof: what it records, what it reads, and that each gate fires.

Kernels compile in processes of their own: this one may have been told to interpret them.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl

from benchmarks.offline import budgets, record
from benchmarks.offline.cubin import Figures, main_loops, parse
from benchmarks.offline.gates import LOOP_SLACK, violations
from benchmarks.offline.loops import loops
from benchmarks.offline.occupancy import ctas_per_sm
from benchmarks.offline.promises import ASYNCHRONOUS_DOTS, Promises, Variant

ROOT = Path(__file__).parents[2]


@triton.jit
def product(
    a, b, c, K, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr = False,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        left = tl.load(a + rows[:, None] * stride + inner[None, :])
        right = tl.load(b + inner[:, None] * stride + columns[None, :])
        total = tl.dot(left, right, total, input_precision="ieee")
    to = c + rows[:, None] * stride + columns[None, :]
    if SPLIT:
        tl.atomic_add(to, total, sem="relaxed")
    else:
        tl.store(to, total)


def launch(dtype=torch.bfloat16, size=512, *, BM=64, BN=64, offset=0, **keywords):
    a, b = (torch.empty(size * size + offset, dtype=dtype, device="meta") for _ in range(2))
    c = torch.empty(size * size, device="meta")
    grid = lambda arguments: (size // arguments["BM"], size // BN)
    product[grid](a[offset:], b, c, size, size, BM=BM, BN=BN, BK=32, num_warps=4, **keywords)


FAST = Promises(tensor_cores=ASYNCHRONOUS_DOTS, no_float_atomics=True, no_async_gathers=True)
GOOD = [Variant("good", launch, FAST)]
BAD = [
    Variant("atomic", lambda: launch(SPLIT=True), FAST, archs=(90,)),
    Variant("spilling", lambda: launch(BM=256, BN=256), FAST, archs=(90,)),
    Variant("small", lambda: launch(BM=16), FAST, archs=(90,)),
    Variant("scalar", lambda: launch(torch.float32), FAST, archs=(90,)),
    Variant("odd offset", lambda: launch(offset=1), FAST, archs=(90,)),
    Variant("nothing", lambda: None, FAST, archs=(90,)),
    Variant("refused", lambda: launch(num_wraps=4), FAST, archs=(90,)),
]
ALL = GOOD + BAD


def print_recorded():
    """Runs in a process that does not interpret."""
    (one,) = record.record(lambda: launch(num_stages=2), 90)
    shapes = {k: list(v.shape) for k, v in one.arguments.items() if isinstance(v, torch.Tensor)}
    numbers = {k: v for k, v in one.arguments.items() if k not in shapes}
    compiled = len(product.device_caches)
    print(json.dumps([shapes, numbers, one.constexprs, one.options, one.grid, compiled]))


def run(*arguments, ok=True):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [ROOT, ROOT / "kernels", ROOT / "engine", Path(__file__).parent]
    inherited = [environment["PYTHONPATH"]] if "PYTHONPATH" in environment else []
    environment["PYTHONPATH"] = os.pathsep.join([*inherited, *map(str, paths)])
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result.stdout


def prove(variants, path, *options, ok=True):
    chosen = ("--variants", f"test_offline:{variants}", "--budgets", path)
    return run("-m", "benchmarks.offline", *chosen, *options, ok=ok)


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """The output of accepting all variants, and the file of their budgets."""
    path = tmp_path_factory.mktemp("offline") / "budgets.json"
    return prove("ALL", path, "--update", ok=False), path


@pytest.fixture
def budget(accepted):
    return budgets.load(accepted[1], triton.__version__)


def test_every_shipped_kernel_is_within_its_budget():
    assert " 0 violations" in run("-m", "benchmarks.offline")


def test_recording_neither_compiles_nor_launches():
    shapes, numbers, constexprs, options, grid, compiled = json.loads(
        run("-c", "import test_offline; test_offline.print_recorded()")
    )
    assert shapes == {"a": [512 * 512], "b": [512 * 512], "c": [512 * 512]}
    assert constexprs == {"BM": 64, "BN": 64, "BK": 32, "SPLIT": False}
    assert numbers == {"K": 512, "stride": 512} | constexprs
    assert options == {"num_warps": 4, "num_stages": 2}
    assert grid == [8, 8]
    assert compiled == 0


def test_recording_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        record.record(launch, 90)


@pytest.mark.parametrize("arch", ASYNCHRONOUS_DOTS)
def test_figures_are_those_of_the_architecture(budget, arch):
    figures = budget[str(arch)]["good"]["product"]
    assert list(figures.tensor_cores) == [ASYNCHRONOUS_DOTS[arch]]
    (loop,), (opcodes,) = figures.loop_instructions, figures.loop_opcodes
    assert opcodes[ASYNCHRONOUS_DOTS[arch]] > 0
    assert opcodes["LDGSTS"] > 0, "loads are pipelined, as they are for aligned tensors"
    assert 0 < loop < figures.instructions
    assert figures.spill_bytes == figures.float_atomics == 0
    assert 16 < figures.registers < 256 and figures.ctas_per_sm > 0
    assert figures.shared_bytes >= 2 * (64 * 32 + 32 * 64) * 2, "two stages of both operands"


def test_alignment_is_that_of_the_tensors(budget):
    (opcodes,) = budget["90"]["odd offset"]["product"].loop_opcodes
    assert opcodes.get("LDG", 0) > 0


def test_each_promise_is_held_to(accepted):
    output, _ = accepted
    for expected in (
        "atomic product sm_90: has 8 floating-point atomics, promises none",
        "spilling product sm_90: spills ",
        "small product sm_90: multiplies with HMMA, promises HGMMA",
        "scalar product sm_90: has 1 scalar dots, promises HGMMA",
        "nothing sm_90: launches nothing",
        "refused sm_90: KeyError: 'Keyword argument num_wraps",
    ):
        assert expected in output
    assert "good product" not in output


def test_a_budget_that_is_kept_passes_and_one_that_is_not_fails(accepted, tmp_path):
    path = tmp_path / "budgets.json"
    written = json.loads(accepted[1].read_text())
    for variants in written[triton.__version__].values():
        for bad in BAD:
            variants.pop(bad.name, None)
    path.write_text(json.dumps(written))
    assert " 0 violations" in prove("GOOD", path)
    figures = written[triton.__version__]["90"]["good"]["product"]
    figures["registers"] -= 1
    written[triton.__version__]["80"]["gone"] = {}
    path.write_text(json.dumps(written))
    output = prove("GOOD", path, "--arch", "90", ok=False)
    now = figures["registers"] + 1
    assert f"good product sm_90: registers {now} over {now - 1}" in output
    assert "gone sm_80: has a budget and is not shipped" in output


def test_an_unknown_triton_is_told_how_to_write_its_budget(tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text('{"0.1": {}}')
    output = prove("GOOD", path, ok=False)
    assert f"No budget for Triton {triton.__version__} (there is one for: 0.1)" in output
    assert "python -m benchmarks.offline --update" in output


def test_a_budget_of_other_figures_is_refused(tmp_path):
    path = tmp_path / "budgets.json"
    path.write_text('{"0.1": {"90": {"v": {"k": {"registers": 1}}}}}')
    with pytest.raises(ValueError, match="delete and update"):
        budgets.load(path, "0.1")


FIGURES = Figures(128, 65536, 0, 2, 2000, [1000, 100], [{}, {}], {"HGMMA": 8}, 0, 0, 0, 0, 1, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"registers": 120, "loop_instructions": [500, 105]}, None),
        ({"loop_instructions": [int(1000 * (1 + LOOP_SLACK)), 100]}, None),
        ({"loop_instructions": [1051, 100]}, "over [1000, 100]"),
        ({"loop_instructions": [1000, 106]}, "over [1000, 100]"),
        ({"loop_instructions": [1000]}, "not of [1000, 100]"),
        ({"registers": 129}, "registers 129 over 128"),
        ({"shared_bytes": 65537}, "shared_bytes 65537 over 65536"),
        ({"ctas_per_sm": 1}, "ctas_per_sm 1 under 2"),
        ({"ctas_per_sm": 0}, "cannot be launched"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"tensor_cores": {"HGMMA": 8, "HMMA": 1}}, "multiplies with HMMA"),
        ({"scalar_dots": 1}, "1 scalar dots"),
        ({"float_atomics": 1}, "1 floating-point atomics"),
        ({"async_gathers": 2}, "2 cp.async of a table's entries"),
        ({"fused_adds": 1}, "1 fused multiply-adds"),
        ({"grid_waits": 0}, "does not wait for the kernel before it"),
        ({"loads_ahead": 0}, "loads nothing before it waits"),
    ],
)
def test_gates(change, reason):
    now = dataclasses.replace(FIGURES, **change)
    strict = dataclasses.replace(FAST, no_fused_adds=True, prefetches=True)
    found = violations(Variant("v", launch, strict), 90, {"k": now}, {"k": FIGURES})
    assert reason in found["k"][0] if reason else not found


def test_gates_of_a_variant_as_a_whole():
    variant = Variant("v", launch, FAST)
    without = dataclasses.replace(FIGURES, tensor_cores={})
    assert violations(variant, 90, {"k": without}, None) == {"": ["no kernel has a HGMMA"]}
    assert violations(variant, 90, {"k": FIGURES}, {}) == {"k": ["has no budget"]}
    assert violations(variant, 90, {"k": FIGURES}, {"k": FIGURES, "l": FIGURES}) == {
        "": ["does not launch l any more"]
    }


def test_the_main_loop_is_neither_the_outer_one_nor_the_way_back_from_a_wait():
    code = parse(
        """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56 ;
        /*0040*/               @P1 BRA 0x80 ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   BRA.U !UP0, 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR13], R28 ;
        /*0090*/               @P1 BRA 0x80 ;
        /*00a0*/                   BRA 0x50 ;
        /*00b0*/                   BRA 0xb0;
        """
    )
    ends = [(loop[0].address, loop[-1].address) for loop in loops(code)]
    assert ends == [(0x10, 0xA0), (0x20, 0xA0), (0x80, 0x90)]
    (main,) = main_loops(loops(code))
    assert [i.address for i in main] == [0x20, 0x30, 0x40, 0x50, 0x80, 0x90, 0xA0]


def test_without_tensor_cores_the_main_loop_is_the_largest():
    outer = parse(
        "/*0000*/ NOP ; /*0010*/ FADD R0, R0, R1 ; /*0020*/ @P0 BRA 0x10 ; /*0030*/ @P1 BRA 0x0 ;"
    )
    assert main_loops(loops(outer)) == [outer]
    assert main_loops(loops(outer[:2])) == main_loops(loops([])) == []


def test_every_loop_with_tensor_cores_is_a_main_loop():
    two = parse(
        "/*0000*/ HMMA R0 ; /*0010*/ @P0 BRA 0x0 ; /*0020*/ HMMA R0 ; /*0030*/ @P1 BRA 0x20 ;"
    )
    assert main_loops(loops(two)) == [two[:2], two[2:]]


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "expected"),
    [
        (90, 32, 0, 4, 16),  # by threads: 2048 / 128
        (90, 128, 0, 8, 2),  # by registers: 65536 / 32768
        (90, 168, 0, 12, 1),
        (90, 16, 0, 1, 32),  # by CTAs
        (80, 32, 81 * 1024, 4, 2),  # by shared memory: 2 x (81 + 1) KiB of 164
        (80, 32, 163 * 1024, 4, 1),
        (80, 32, 163 * 1024 + 1, 4, 0),
        (90, 32, 227 * 1024, 4, 1),
    ],
)
def test_ctas_per_sm(arch, registers, shared_bytes, num_warps, expected):
    found = ctas_per_sm(arch, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps)
    assert found == expected


def test_tensor_memory_limits_ctas():
    few = {"registers": 32, "shared_bytes": 0, "num_warps": 4}
    assert ctas_per_sm(100, **few, tensor_memory_columns=128) == 4
