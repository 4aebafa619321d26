"""That what decides a token is compiled as the float rule wants it, without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from musiclm_kernels import sample_logits, sample_next_token
from musiclm_kernels.testing import through_kernels

pytest.importorskip("triton")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from musiclm_kernels.sampling.kernel import _sample_logits

constants = dict(GREEDY=False, TOP_K=True, TOP_P=True, MIN_P=True, BLOCK_V=1024, allowed_ptr=None)
pointers = dict(logits="fp32", unconditional="fp32", seeds="i64", steps="i64", tokens="i64")
floats = ("guidance_scale", "inverse_temperature", "largest_deficit")
signature = {}
for name in _sample_logits.arg_names:
    if name in constants:
        signature[name] = "constexpr"
    elif name.endswith("_ptr"):
        signature[name] = "*" + pointers[name[:-4]]
    else:
        signature[name] = "fp32" if name in floats else "i32"
for fusion in (False, True):
    source = triton.compiler.ASTSource(_sample_logits, signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": fusion}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    count = lambda text: sum(text in line for line in code.splitlines())
    print(count("fma."), count(".ftz"), count("div."), count(".approx"), count("mul."))
"""


def test_no_operation_is_fused_flushed_or_approximate():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        check=True, env=environment, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    ours, fused = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert ours[:4] == [0, 0, 0, 0] and ours[4] > 100
    assert fused[0] > 20  # the count sees what it looks for


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are looked at in the interpreter")
def test_every_launch_forbids_fusion(monkeypatch):
    from musiclm_kernels.sampling import kernel, next_token

    options = []

    class Spy:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            def launch(*arguments, **keywords):
                options.append(keywords["enable_fp_fusion"])
                return self.function[grid](*arguments, **keywords)

            return launch

    monkeypatch.setattr(kernel, "_sample_logits", Spy(kernel._sample_logits))
    monkeypatch.setattr(next_token, "_sample_next_token", Spy(next_token._sample_next_token))
    seeds = torch.arange(2)
    with through_kernels():
        sample_logits(torch.zeros(2, 8), seeds=seeds, step=0)
        sample_next_token(
            torch.ones(2, 16), torch.ones(16), None, torch.ones(1, 8, 16), torch.ones(1, 8, 16),
            step=torch.tensor(0), seeds=seeds,
        )  # fmt: skip
    assert options == [False, False]
