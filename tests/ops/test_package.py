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
from musiclm_kernels.testing import through_kernels

FOLDER = Path(musiclm_kernels.__file__).parent
OPS = [
    "biased_attention",
    "contrastive_loss",
    "decode_attention",
    "drop_patches",
    "rvq_decode",
    "rvq_ema_update",
    "rvq_encode",
    "sample_logits",
]


@pytest.mark.parametrize("name", OPS)
def test_a_reference_has_its_ops_signature(name):
    public, plain = getattr(musiclm_kernels, name), getattr(reference, name)
    assert inspect.signature(public) == inspect.signature(plain)
    assert "Raises:" in public.__doc__ and "Source:" in public.__doc__


def test_implementations_are_what_is_registered():
    found = musiclm_kernels.implementations()
    assert set(OPS) <= set(found)
    for name, bodies in found.items():
        assert bodies == {"cpu": "reference", "cuda": "reference"}
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"musiclm::{name}", device)
    found.clear()
    assert musiclm_kernels.implementations()


def test_through_kernels_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        through_kernels()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="no Triton kernel exists yet"):
        through_kernels()


def test_imports_torch_and_itself_alone():
    allowed = {"musiclm_kernels", "torch"} | set(sys.stdlib_module_names)
    for file in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, file


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
"""
    path = {"PYTHONPATH": str(FOLDER.parent), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=path, timeout=120)
