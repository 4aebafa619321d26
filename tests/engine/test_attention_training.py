"""What a training step of the audio tower costs: one small bias table, and no scores in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_engine.attention import DynamicPositionBias2d, PositionBias
from musiclm_engine.mulan import AudioSpectrogramTransformer
from musiclm_kernels import biased_attention, reference

DEPTH, HEADS, SECONDS = 3, 2, 10
PATCHES = 125 * 8  # columns of 80 ms, rows of 8 bins
KEPT = 750


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that an operation gave; what an op of ours does is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.ours = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        if func.namespace == "musiclm":
            self.ours.add(func._opname)
        return out


@pytest.fixture(scope="module")
def tower() -> AudioSpectrogramTransformer:
    torch.manual_seed(0)
    return AudioSpectrogramTransformer(
        16, DEPTH, patch_size=8, heads=HEADS, dim_head=8, num_mels=64, attn_dropout=0.1
    )


def step(tower: AudioSpectrogramTransformer) -> None:
    tower(0.1 * torch.randn(1, SECONDS * tower.sample_rate_hz)).square().sum().backward()


def test_no_tensor_has_a_value_for_every_pair(tower):
    with LargestTensor() as largest:
        step(tower)
    assert {"biased_attention", "biased_attention_backward"} <= largest.ours
    assert PATCHES < largest.numel < KEPT**2


def test_the_measure_sees_the_scores_where_they_are():
    bias = DynamicPositionBias2d(8, HEADS).position_bias(10, 8)
    q, k, v = torch.randn(3, 1, HEADS, 80, 8)
    for attend, holds in ((biased_attention, False), (reference.biased_attention, True)):
        with LargestTensor() as largest:
            attend(q, k, v, **(bias.arguments() if not holds else {}))
        assert (largest.numel >= 80**2) is holds


def test_every_layer_reads_one_table_which_is_made_once(tower, monkeypatch):
    calls, tables = [], []
    hook = tower.dynamic_pos_bias_mlp.register_forward_hook(lambda *_: calls.append(1))
    original = PositionBias.arguments

    def recording(bias):
        tables.append(bias.table)
        return original(bias)

    monkeypatch.setattr(PositionBias, "arguments", recording)
    backward_calls = []
    first = tower.dynamic_pos_bias_mlp[0]
    weight_hook = first.weight.register_hook(lambda grad: backward_calls.append(1))
    step(tower)
    hook.remove()
    weight_hook.remove()
    assert len(calls) == len(backward_calls) == 1
    assert len(tables) == DEPTH and all(table is tables[0] for table in tables)
    assert tables[0].shape == (HEADS, (2 * 125 - 1) * (2 * 8 - 1))


def test_evaluation_compiles_whole():
    torch.manual_seed(0)
    tower = AudioSpectrogramTransformer(16, 1, heads=1, dim_head=8, num_mels=32).eval()
    audio = 0.1 * torch.randn(2, 8000)
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(audio), tower(audio))
