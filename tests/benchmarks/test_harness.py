"""The benchmark harness: what it refuses to report, and what it writes down."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import peers, record, timing
from benchmarks.ast_block import SUITE as AST_BLOCK
from benchmarks.ast_block import AstBlockCase
from benchmarks.attention import MLP_PARAMETERS, AttentionCase, make_inputs, plain_attention
from benchmarks.attention import SUITE as ATTENTION
from benchmarks.attention import cases as attention_cases
from benchmarks.case import Call, CannotRun, Case, Provider, Suite, Tensors, Work, to_float64
from benchmarks.gate import judge
from benchmarks.plots import newest_times
from benchmarks.record import ABOVE_ROOF, CANNOT_RUN, TIMED, WRONG, Recorder, describe_run, read
from benchmarks.replay import ReplayClock
from benchmarks.roof import above_roof, floor_us, roof_of
from benchmarks.run import run_case, run_suite, timed_row
from benchmarks.table import print_table
from benchmarks.timing import Timing, measure
from musiclm_kernels import reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True, kw_only=True)
class SquareCase(Case):
    """A toy: x squared."""

    op: ClassVar[str] = "square"
    dtype: str = "float32"
    size: int = 64

    @property
    def name(self) -> str:
        return f"size={self.size}"

    def work(self) -> Work:
        return Work(flops=self.size, num_bytes=8 * self.size)


def square_inputs(case: SquareCase, device: torch.device) -> Tensors:
    return {"x": torch.randn(case.size, generator=torch.Generator().manual_seed(0))}


def suite_of(**builds) -> Suite[SquareCase]:
    return Suite(
        name="square",
        cases=lambda device_type: [SquareCase()],
        make_inputs=square_inputs,
        plain=lambda case, inputs: {"out": inputs["x"] ** 2},
        providers=tuple(Provider(name, build) for name, build in builds.items()),
        baseline="right",
    )


def right(case: SquareCase, inputs: Tensors) -> Call:
    return lambda: {"out": inputs["x"] * inputs["x"]}


def rows_of(suite: Suite[SquareCase]) -> dict[str, dict]:
    rows = run_case(suite, SquareCase(), CPU, budget_s=0.01)
    return {row["provider"]: row for row in rows}


def test_a_right_provider_is_timed():
    row = rows_of(suite_of(right=right))["right"]
    assert row["status"] == TIMED and row["method"] == "clock"
    assert len(row["samples_us"]) == row["rounds"] >= 3
    assert 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
    assert row["floor_us"] is None and row["peak_bytes"] is None  # none for a CPU


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.abs(),
        lambda x: x.square() * 1.0001,  # less than TF32 errs
        lambda x: torch.cat((x[:-1].square(), x[-1:] * 0)),
        lambda x: x.square().masked_fill(x > 1, float("nan")),
        lambda x: x.square()[:-1],
    ],
)
def test_the_gate_refuses_a_wrong_provider(wrong):
    rows = rows_of(suite_of(right=right, wrong=lambda c, i: lambda: {"out": wrong(i["x"])}))
    assert rows["wrong"]["status"] == WRONG
    assert "out" in rows["wrong"]["reason"]
    assert "median_us" not in rows["wrong"]
    assert rows["right"]["status"] == TIMED


def test_the_gate_refuses_missing_and_additional_results():
    truth = {"out": torch.ones(2, dtype=torch.float64), "grad_x": torch.ones(2)}
    for results in ({"out": torch.ones(2)}, {**truth, "more": torch.ones(2)}):
        assert not judge(results, truth, truth).passed


def test_the_gate_sees_one_wrong_row_of_many():
    truth = torch.randn(300_000, 8, dtype=torch.float64)
    yardstick = {"out": truth.bfloat16()}
    results = {"out": truth.bfloat16()}
    assert judge(results, {"out": truth}, yardstick).passed
    results["out"][7] = 0.0
    verdict = judge(results, {"out": truth}, yardstick)
    assert verdict.errors["out"].relative < verdict.errors["out"].budget  # the norm hides it
    assert not verdict.passed


def test_a_gradient_that_is_zero_has_to_be_zero():
    truth, right = {"grad_q": torch.full((4,), 1e-17).double()}, {"grad_q": torch.zeros(4)}
    assert judge(right, truth, right).passed
    assert not judge({"grad_q": torch.full((4,), 1e-3)}, truth, right).passed


def test_a_provider_that_turns_wrong_while_it_is_timed_has_no_time():
    calls = []

    def build(case: SquareCase, inputs: Tensors) -> Call:
        def call() -> Tensors:
            calls.append(1)
            return {"out": inputs["x"] ** 2 + (len(calls) > 2)}

        return call

    row = rows_of(suite_of(moving=build))["moving"]
    assert row["status"] == WRONG and row["reason"].startswith("right once, then")
    assert "median_us" not in row


def test_a_provider_that_cannot_run_leaves_its_reason():
    def absent(case: SquareCase, inputs: Tensors) -> Call:
        raise CannotRun("not importable: nothing of that name")

    def breaks(case: SquareCase, inputs: Tensors) -> Call:
        raise NotImplementedError("no such\nshape")

    rows = rows_of(suite_of(absent=absent, breaks=breaks, right=right))
    assert rows["absent"]["status"] == CANNOT_RUN
    assert rows["absent"]["reason"] == "not importable: nothing of that name"
    assert rows["breaks"]["reason"] == "NotImplementedError: no such shape"
    assert rows["right"]["status"] == TIMED


def test_an_easier_case_is_checked_and_counted_as_itself():
    answers = Provider("half", right, answers=lambda case: replace(case, size=32))
    suite = replace(suite_of(), providers=(answers,))
    small = {"x": square_inputs(SquareCase(), CPU)["x"][:32]}
    suite = replace(suite, make_inputs=lambda case, device: small)
    (row,) = run_case(suite, SquareCase(), CPU, budget_s=0.01)
    assert row["case"] == "size=64" and row["answers"] == "size=32"
    assert row["tflops"] == pytest.approx(32 / row["median_us"] / 1e6, rel=1e-3)


def test_a_time_above_the_roof_is_an_error():
    roof = roof_of("NVIDIA H100 80GB HBM3")
    case = AttentionCase(batch=32, grid_rows=8, grid_columns=62)
    floor = floor_us(case, roof)
    assert floor is not None and 15 < floor < 25  # memory: 65 MB at 3 TB/s
    assert not above_roof(floor * 1.01, floor)
    assert "above the roof" in above_roof(floor * 0.9, floor)
    passed = judge({"out": torch.ones(1)}, {"out": torch.ones(1)}, {"out": torch.ones(1)})
    row = timed_row(passed, case, Timing((floor * 0.5,), "graph"), roof)
    assert row["status"] == ABOVE_ROOF and "median_us" not in row
    assert timed_row(passed, case, Timing((floor * 2,), "graph"), roof)["share_of_floor"] == 0.5


def test_there_is_no_time_without_a_passed_gate():
    failed = judge({"out": torch.zeros(1)}, {"out": torch.ones(1)}, {"out": torch.ones(1)})
    with pytest.raises(ValueError, match="no time without a passed gate"):
        timed_row(failed, SquareCase(), Timing((1.0,), "clock"), None)


def test_there_is_no_roof_where_none_was_measured():
    assert roof_of("CPU of some kind") is None
    assert floor_us(SquareCase(), None) is None
    assert floor_us(SquareCase(dtype="float64"), roof_of("NVIDIA H200")) is None


def test_calls_are_timed_in_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or {"out": torch.ones(1)} for name in "abc"}
    timings = measure(calls, CPU, 0.0, lambda name, results: True)
    assert order == list("abc") * 3
    assert [len(timing.samples_us) for timing in timings.values()] == [3, 3, 3]


def on_a_gpu_of_make_believe(monkeypatch, times_us: dict[str, float], unfit: set[str]):
    """What a GPU would give: `times_us` by call, graphs of all calls but the unfit."""
    calls = {name: lambda name=name: {"out": name} for name in times_us}

    class Graph:
        def __init__(self, call: Call):
            self.call, self.name = call, call()["out"]
            if self.name in unfit:
                raise RuntimeError("operation not permitted when stream is capturing")

        def replay(self) -> Tensors:
            return self.call()

        def replay_over_nan(self) -> Tensors:
            return self.call()

    monkeypatch.setattr(timing, "_event_timer", lambda: lambda call: times_us[call()["out"]])
    monkeypatch.setattr(timing, "captured", Graph)
    return measure(calls, torch.device("cuda"), 0.0, lambda name, results: name != "differs")


def test_quick_calls_are_timed_as_graphs_that_give_the_right_results(monkeypatch):
    times_us = {"quick": 20.0, "slow": 900.0, "unfit": 30.0, "differs": 40.0}
    timings = on_a_gpu_of_make_believe(monkeypatch, times_us, unfit={"unfit"})
    methods = {name: timing.method for name, timing in timings.items()}
    assert methods == {"quick": "graph", "slow": "graph", "unfit": "events", "differs": "events"}
    assert {name: timing.median_us for name, timing in timings.items()} == times_us


def test_slow_calls_are_timed_by_events(monkeypatch):
    timings = on_a_gpu_of_make_believe(monkeypatch, {"a": 900.0, "b": 2e3}, unfit=set())
    assert {timing.method for timing in timings.values()} == {"events"}


def test_quantiles():
    times = Timing(tuple(float(sample) for sample in (5, 1, 2, 3, 4, 100)), "clock")
    assert (times.low_us, times.median_us, times.high_us) == (2, 3.5, 5)


def test_rows_are_appended_and_the_file_is_always_whole(tmp_path, monkeypatch):
    path = tmp_path / "results" / "device-2026-01-01.json"
    run = {**describe_run(CPU), "started": "2026-01-01T00:00:00Z"}
    first = Recorder(path, run)
    first.append([{"op": "a"}])
    first.append([{"op": "b"}])
    second = Recorder(path, {**run, "started": "2026-01-01T00:00:01Z"})
    second.append([{"op": "c"}])
    content = read(path)
    assert [row["op"] for row in content["rows"]] == ["a", "b", "c"]
    assert [r["run"] for r in content["runs"]] == [first.run_id, second.run_id]
    assert [row["run"] for row in content["rows"]] == [first.run_id] * 2 + [second.run_id]

    before = path.read_text()
    with pytest.raises(ValueError, match="Out of range"):  # NaN is no JSON
        second.append([{"op": "d", "median_us": float("nan")}])
    monkeypatch.setattr(Path, "write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        second.append([{"op": "e"}])
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_another_json_file_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"x\.json is no result file"):
        read(path)


def test_a_run_says_what_it_ran_on():
    run = describe_run(CPU, commit="abc")
    assert run["commit"] == "abc" and run["torch"] == torch.__version__
    assert run["threads"] == torch.get_num_threads() and run["driver"] is None
    assert run["device"].startswith("CPU ") and str(run["threads"]) in run["device"]
    json.dumps(run)


def test_the_command_has_no_path_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", f"{Path.cwd()}/benchmarks", "--dry"])
    assert record.describe_run(CPU)["command"].endswith(" benchmarks --dry")


def test_a_suite_writes_each_case_and_counts_what_is_wrong(tmp_path, capsys):
    suite = suite_of(right=right, wrong=lambda c, i: lambda: {"out": i["x"]})
    recorder = Recorder(tmp_path / "r.json", {"started": "now"})
    assert run_suite(suite, CPU, recorder, budget_s=0.01) == 1
    assert [row["status"] for row in read(recorder.path)["rows"]] == [TIMED, WRONG]
    assert run_suite(suite, CPU, recorder, budget_s=0.01, deadline=0.0) == 0
    assert run_suite(suite, CPU, recorder, budget_s=0.01, match="no such case") == 0
    assert len(read(recorder.path)["rows"]) == 2
    printed = capsys.readouterr().out
    assert "right" in printed and "wrong: wrong: out errs" in printed
    assert "no time left for size=64" in printed


def test_the_table_prints_a_files_rows(capsys):
    rows = rows_of(suite_of(right=right)).values()
    print_table([{"run": "1", **row} for row in rows], baseline="right")
    assert "1.00" in capsys.readouterr().out


def test_plots_take_the_newest_time():
    old, new = ({"case": "c", "provider": "p", "median_us": us} for us in (2.0, 1.0))
    untimed = {"case": "c", "provider": "p", "status": WRONG}
    assert newest_times([old, new, untimed]) == {"c": {"p": new}}


def test_the_replay_clock_gives_each_round_its_sample():
    clock = ReplayClock()
    clock.load([3.0, 1.0])
    read_us = []
    for _ in range(3):
        before = clock()
        clock.step()
        read_us.append((clock() - before) * 1e6)
    assert read_us == pytest.approx([3.0, 1.0, 0.0])


def test_a_peer_that_is_not_installed_is_no_error(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotRun, match="musiclm_pytorch is not installed"):
        peers.musiclm_pytorch.__wrapped__()
    with pytest.raises(CannotRun, match="not importable: ModuleNotFoundError"):
        peers.import_peer("no_such_package_anywhere")


def test_stand_ins_are_gone_after_the_import(monkeypatch, tmp_path):
    import sys

    (tmp_path / "musiclm_pytorch.py").write_text(
        "from x_clip.tokenizer import tokenizer\n"
        "from audiolm_pytorch.utils import AudioConditionerBase\n"
        "class Quantizer(AudioConditionerBase): vocabulary = tokenizer.vocab_size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "musiclm_pytorch", None)
    monkeypatch.delitem(sys.modules, "musiclm_pytorch")
    for name in [name for name in sys.modules if name.partition(".")[0] in peers.STAND_INS]:
        monkeypatch.delitem(sys.modules, name)  # another test's, and the real one
    module = peers.musiclm_pytorch.__wrapped__()
    assert module.Quantizer(1, two=2) is not None
    assert not {"x_clip", "x_clip.tokenizer", "audiolm_pytorch"} & set(sys.modules)


SMALL = {"batch": 2, "heads": 2, "head_dim": 8, "grid_rows": 3, "grid_columns": 5}


@pytest.mark.parametrize("kept", [None, 9])
@pytest.mark.parametrize("bias", ["none", "table", "mlp"])
def test_the_definition_of_attention_is_the_kernels(kept: int | None, bias: str):
    """Two ways: this one's plain PyTorch, and the reference of musiclm_kernels."""
    case = AttentionCase(
        **SMALL, kept=kept, bias=bias, dtype="float64", mode="forward+backward", layout="BNHD"
    )
    inputs = to_float64(make_inputs(case, CPU))
    results = plain_attention(case, inputs)
    names = ["q", "k", "v"]
    names += {"none": [], "table": ["table"], "mlp": list(MLP_PARAMETERS)}[bias]
    assert sorted(results) == sorted(["out", *(f"grad_{name}" for name in names)])

    table = inputs.get("table")
    if bias == "mlp":
        rows, columns = torch.arange(-2, 3), torch.arange(-4, 5)
        offsets = torch.cartesian_prod(columns, rows).flip(1).double()
        table = mlp_of(inputs, offsets).T.contiguous()
    codes = None if bias == "none" else inputs["codes"]
    expected = reference.biased_attention(
        inputs["q"], inputs["k"], inputs["v"], table=table, q_codes=codes, k_codes=codes,
        offset=case.offset,
    )  # fmt: skip
    torch.testing.assert_close(results["out"], expected)


def mlp_of(inputs: Tensors, x: Tensor) -> Tensor:
    for layer in (0, 2, 4):
        x = x @ inputs[f"mlp.{layer}.weight"].T + inputs[f"mlp.{layer}.bias"]
        x = x if layer == 4 else x * x.sigmoid()
    return x


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("bias", ["table", "mlp"])
def test_ours_passes_the_gate_in_each_mode(mode: str, bias: str):
    case = AttentionCase(**SMALL, kept=9, bias=bias, dtype="float32", mode=mode)
    rows = run_case(ATTENTION, case, CPU, budget_s=0.0, only=["ours", "sdpa math", "ours, no bias"])
    assert [row["status"] for row in rows] == [TIMED] * 3, rows
    assert [row.get("answers", row["case"]) == row["case"] for row in rows] == [True, True, False]


def test_the_gradient_of_a_frozen_table_is_no_result():
    case = AttentionCase(**SMALL, dtype="float32", mode="backward", table_gradient=False)
    (row,) = run_case(ATTENTION, case, CPU, budget_s=0.0, only=["ours"])
    assert row["status"] == TIMED and sorted(row["errors"]) == ["grad_k", "grad_q", "grad_v"]


@pytest.mark.parametrize("kept", [None, 24])
def test_our_block_passes_the_gate(kept: int | None):
    case = AstBlockCase(
        batch=2, dim=16, heads=2, head_dim=8, grid_rows=4, grid_columns=8, kept=kept,
        dtype="float32",
    )  # fmt: skip
    (row,) = run_case(AST_BLOCK, case, CPU, budget_s=0.0, only=["ours"])
    assert row["status"] == TIMED, row
    assert "grad_mlp.0.weight" in row["errors"] and "grad_x" in row["errors"]


@pytest.mark.parametrize("suite", [ATTENTION, AST_BLOCK], ids=lambda suite: suite.name)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_cases_and_providers_have_names_of_their_own(suite: Suite, device_type: str):
    names = [case.name for case in suite.cases(device_type)]
    assert len(set(names)) == len(names) > 0
    providers = [provider.name for provider in suite.providers]
    assert len(set(providers)) == len(providers) and suite.baseline in providers
    for case in suite.cases(device_type):
        json.dumps(case.as_row())
        assert case.work().flops > 0 and case.work().num_bytes > 0


def test_a_gpu_times_what_the_models_use():
    assert {case.length for case in attention_cases("cuda")} == {372, 496, 1024, 2048}
    forward = AttentionCase(batch=32, grid_rows=8, grid_columns=62)
    assert forward.work().flops == pytest.approx(16.1e9, rel=0.01)
    assert replace(forward, mode="backward").work().flops == 2.5 * forward.work().flops
