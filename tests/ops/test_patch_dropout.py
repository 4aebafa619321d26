import pytest
import torch
from torch._dynamo.testing import CompileCounter

from musiclm_kernels import drop_patches, reference
from musiclm_kernels.philox import random_words


@pytest.mark.parametrize("function", [drop_patches, reference.drop_patches])
@pytest.mark.parametrize("B, N, keep", [(1, 1, 1), (3, 33, 32), (2, 100, 1), (4, 17, 17)])
def test_keeps_the_smallest_words(function, B, N, keep):
    x = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(0))
    kept, indices = function(x, keep, seed=9)
    for b in range(B):
        drawn = [(random_words(9, torch.tensor((b << 32) + n)).item(), n) for n in range(N)]
        wanted = sorted(n for _, n in sorted(drawn)[:keep])
        assert indices[b].tolist() == wanted
        assert torch.equal(kept[b], x[b, wanted])


def test_equal_words_keep_the_lower_patch(monkeypatch):
    monkeypatch.setattr(
        "musiclm_kernels.patch_dropout.reference.random_words",
        lambda seed, offset: torch.zeros_like(offset),
    )
    _, indices = drop_patches(torch.zeros(2, 50, 1), 7, seed=0)
    assert indices.tolist() == [list(range(7))] * 2


def test_every_patch_and_pair_is_equally_likely():
    N, keep, B = 12, 5, 20_000
    _, indices = drop_patches(torch.zeros(B, N, 1), keep, seed=4)
    stays = torch.zeros(B, N).scatter_(1, indices, 1.0)
    together = stays.mT @ stays / B
    single, pair = keep / N, keep * (keep - 1) / (N * (N - 1))
    wanted = torch.full((N, N), pair).fill_diagonal_(single)
    assert (together - wanted).abs().max() < 5 * (0.25 / B) ** 0.5


def test_depends_on_seed_and_row_alone():
    x = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0))
    _, indices = drop_patches(x, 20, seed=1)
    torch.manual_seed(123)
    assert torch.equal(drop_patches(x * 2, 20, seed=1)[1], indices)
    assert torch.equal(drop_patches(x[:2], 20, seed=1)[1], indices[:2])
    assert not torch.equal(drop_patches(x, 20, seed=2)[1], indices)
    assert not torch.equal(drop_patches(x, 20, seed=1 + 2**32)[1], indices)
    assert len({tuple(row) for row in indices.tolist()}) == 3


def test_leaves_the_generator_alone():
    before = torch.get_rng_state()
    drop_patches(torch.zeros(2, 9, 1), 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: drop_patches(x, 4, seed=3)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: drop_patches(x, 4, seed=3)[0], (x,))


def test_a_seed_may_be_a_number_or_a_tensor():
    x = torch.randn(2, 30, 1)
    for seed in (3, -1, 2**40):
        numbers, tensors = (drop_patches(x, 9, seed=s) for s in (seed, torch.tensor(seed)))
        assert all(map(torch.equal, numbers, tensors))


def test_every_subset_is_equally_likely():
    N, keep, B = 6, 3, 20_000
    _, indices = drop_patches(torch.zeros(B, N, 1), keep, seed=11)
    assert (indices.diff(dim=1) > 0).all()
    counts = (2**indices).sum(1).bincount()
    counts = counts[counts > 0]
    expected = B / 20
    assert len(counts) == 20  # 6 over 3
    assert (counts - expected).square().sum() / expected < 53  # chi-square, 19 degrees: p < 5e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_copied_in_any_dtype(dtype):
    x = torch.randn(2, 9, 3).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    kept, indices = drop_patches(x, 5, seed=0)
    assert kept.dtype == dtype and torch.equal(kept[1], x[1, indices[1]])


def test_no_rows():
    kept, indices = drop_patches(torch.zeros(0, 9, 3), 5, seed=0)
    assert kept.shape == (0, 5, 3) and indices.shape == (0, 5)


def test_op_contract():
    x = torch.randn(2, 9, 3, requires_grad=True)
    seed = torch.tensor(7)
    torch.library.opcheck(torch.ops.musiclm.drop_patches.default, (x, 5, seed))
    _, indices, slots = torch.ops.musiclm.drop_patches(x, 5, seed)
    torch.library.opcheck(torch.ops.musiclm.take_patches.default, (x, indices, slots))


def test_compiles_once_for_every_seed():
    x = torch.randn(2, 9, 3)
    counter = CompileCounter()
    counted = torch.compile(
        lambda x, seed: drop_patches(x, 5, seed=seed), fullgraph=True, backend=counter
    )
    for seed in range(3, 9):
        counted(x, seed)
    assert counter.frame_count <= 2  # once as a constant, once as a symbol


def test_compiles_without_graph_break():
    x = torch.randn(2, 9, 3, requires_grad=True)
    compiled = torch.compile(lambda x: drop_patches(x, 5, seed=7)[0] * 2, fullgraph=True)
    out, wanted = compiled(x), drop_patches(x, 5, seed=7)[0] * 2
    torch.testing.assert_close(out, wanted)
    (grad,), (other,) = (torch.autograd.grad(y.sum(), x) for y in (out, wanted))
    assert torch.equal(grad, other)


@pytest.mark.parametrize(
    "x, keep, name",
    [
        (torch.zeros(2, 9), 3, "x has shape"),
        (torch.zeros(2, 9, 3, dtype=torch.int32), 3, "x is torch.int32"),
        (torch.zeros(2, 9, 3), 0, "keep is 0"),
        (torch.zeros(2, 9, 3), 10, "keep is 10, wanted 1 to 9"),
    ],
)
def test_refusals(x, keep, name):
    with pytest.raises(ValueError, match=name):
        drop_patches(x, keep, seed=0)


@pytest.mark.parametrize("seed", [torch.tensor([1]), torch.tensor(1.0)])
def test_refuses_seeds(seed):
    with pytest.raises(ValueError, match="seed"):
        drop_patches(torch.zeros(2, 9, 3), 4, seed=seed)
