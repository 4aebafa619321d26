"""What holds for musiclm_kernels as a whole."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import musiclm_kernels
from musiclm_kernels import reference
from musiclm_kernels.registry import define_op
from musiclm_kernels.testing import through_kernels

FOLDER = Path(musiclm_kernels.__file__).parent
NOT_OPS = {"HyperConnection", "implementations", "quantize_weight", "random_words", "reference"}
OPS = sorted(set(musiclm_kernels.__all__) - NOT_OPS)


@pytest.mark.parametrize("name", OPS)
def test_a_reference_has_its_ops_signature(name):
    public, plain = getattr(musiclm_kernels, name), getattr(reference, name)
    assert inspect.signature(public) == inspect.signature(plain)
    assert "Raises:" in public.__doc__ and "Source:" in public.__doc__


def test_implementations_are_what_is_registered():
    found = musiclm_kernels.implementations()
    # The loss is computed from its statistics, which are registered under its name.
    assert set(OPS) - {"contrastive_statistics"} <= set(found)
    for name, bodies in found.items():
        assert bodies in (
            {"cpu": "reference", "cuda": "reference"},
            {"cpu": "reference", "cuda": "triton"},
        )
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"musiclm::{name}", device)
    found.clear()
    assert musiclm_kernels.implementations()


@pytest.fixture
def interpreter():
    """Skips where Triton is missing, or compiles for a GPU: conftest.py chose when it was imported."""
    if not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("Triton was imported without its interpreter")


def test_through_kernels_wants_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before"):
        through_kernels()


def test_through_kernels_wants_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton.language", None)
    with pytest.raises(RuntimeError, match="through_kernels needs Triton: "):
        through_kernels()


def test_through_kernels_wants_the_interpreter_chosen_in_time(interpreter):
    code = """
import os
import triton
os.environ["TRITON_INTERPRET"] = "1"
from musiclm_kernels.registry import define_op
from musiclm_kernels.testing import through_kernels
try:
    through_kernels()
except RuntimeError as error:
    print(error)
"""
    path = {"PYTHONPATH": str(FOLDER.parent), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True, env=path, timeout=120, capture_output=True, text=True,
    )  # fmt: skip
    assert "Triton was imported before TRITON_INTERPRET=1 was set" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_through_kernels_refuses_what_no_kernel_takes(interpreter, dtype):
    q, scale = torch.ones(1, 2, 3, 4, dtype=dtype), torch.ones(4)
    with through_kernels(), pytest.raises(RuntimeError, match=f"qk_l2norm runs on CPU in {dtype}"):
        musiclm_kernels.qk_l2norm(q, q, scale, scale)
    assert musiclm_kernels.qk_l2norm(q, q, scale, scale)[0].dtype == dtype


def test_no_kernel_takes_a_type_that_hides_behind_another(interpreter):
    books = torch.ones(1, 2, 3, dtype=torch.float64)
    with (
        through_kernels(),
        pytest.raises(RuntimeError, match=r"rvq_decode runs on CPU in torch\.f"),
    ):
        musiclm_kernels.rvq_decode(torch.zeros(2, 1, dtype=torch.int64), books)


def test_through_kernels_refuses_an_op_without_a_kernel(interpreter):
    op = define_op("without_kernel", "(Tensor x) -> Tensor", torch.clone, torch.empty_like)
    with through_kernels(), pytest.raises(RuntimeError, match="musiclm::without_kernel"):
        op(torch.ones(2))
    assert op(torch.ones(2)).shape == (2,)


def test_through_kernels_runs_them_and_ends(interpreter, monkeypatch):
    from musiclm_kernels.qk_l2norm import kernel

    calls = []
    monkeypatch.setattr(
        kernel, "qk_l2norm", lambda q, k, *scales: calls.append(1) or (q + 0, k + 0)
    )
    q, scale = torch.ones(1, 2, 3, 4), torch.ones(4)
    with through_kernels():
        musiclm_kernels.qk_l2norm(q, q, scale, scale)
    assert len(calls) == 1
    musiclm_kernels.qk_l2norm(q, q, scale, scale)
    assert len(calls) == 1


def may_import_triton(file):
    """An op's kernel and the modules it is made of; and `through_kernels`, when it is called."""
    folders = file.relative_to(FOLDER).parts[:-1]
    if not folders:
        return file.name in ("testing.py", "target.py")
    return file.name not in ("__init__.py", "op.py", "reference.py")


def test_imports_torch_and_itself_alone_but_for_triton_in_kernels():
    allowed = {"musiclm_kernels", "torch"} | set(sys.stdlib_module_names)
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                names = [node.module]
            strangers = {name.split(".")[0] for name in names} - allowed
            assert strangers <= ({"triton"} if may_import_triton(file) else set()), file


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # every import of it now fails
import torch
import musiclm_kernels
x = torch.randn(2, 3, 4, requires_grad=True)
musiclm_kernels.drop_patches(x, 2, seed=0)[0].sum().backward()
q = torch.randn(1, 2, 3, 4)
assert musiclm_kernels.biased_attention(q, q, q).shape == q.shape
q.requires_grad_()
musiclm_kernels.qk_l2norm(q, q, torch.ones(4), torch.ones(2, 4))[0].sum().backward()
"""
    path = {"PYTHONPATH": str(FOLDER.parent), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=path, timeout=120)
