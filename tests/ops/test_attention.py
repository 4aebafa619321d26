import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_kernels import biased_attention, reference
from musiclm_kernels.attention import blocked
from musiclm_kernels.philox import WORD, philox_4x32

BIG = 2**30


def inputs(B=2, H=4, Hkv=2, N=5, M=7, D=8, T=11, dtype=torch.float64, shared=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = 1 if shared else B
    codes = torch.randint(0, 9, (rows, N + M), generator=generator, dtype=torch.int32)
    wide = torch.promote_types(dtype, torch.float32)
    bias = {"table": draw(H, T).to(wide), "q_codes": codes[:, :N], "k_codes": codes[:, N:]}
    return draw(B, H, N, D), draw(B, Hkv, M, D), draw(B, Hkv, M, D), bias


def materialised_bias(table, q_codes, k_codes, offset):
    """[B or 1, H, N, M], one entry at a time, in Python's integers."""
    H, T = table.shape
    rows = max(len(q_codes), len(k_codes))
    bias = table.new_empty(rows, H, q_codes.shape[1], k_codes.shape[1])
    for b in range(rows):
        for i in range(q_codes.shape[1]):
            for j in range(k_codes.shape[1]):
                q_code = q_codes[b % len(q_codes), i].item()
                k_code = k_codes[b % len(k_codes), j].item()
                bias[b, :, i, j] = table[:, min(max(q_code - k_code + offset, 0), T - 1)]
    return bias


def by_sdpa(q, k, v, bias=None, causal=False, key_mask=None, scale=None):
    """An independent oracle: everything materialised, PyTorch's attention, empty rows zeroed."""
    B, H, N, _ = q.shape
    M = k.shape[2]
    sees = torch.ones(B, 1, N, M, dtype=torch.bool)
    if causal:
        sees &= torch.arange(M) <= torch.arange(N)[:, None] + (M - N)
    if key_mask is not None:
        sees &= key_mask[:, None, None, :]
    mask = torch.zeros(B, H, N, M, dtype=q.dtype) if bias is None else bias.expand(B, H, N, M)
    mask = mask.masked_fill(~sees, -1e300)
    k, v = (x.repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.where(sees.any(-1, keepdim=True), out, 0.0)


@pytest.mark.parametrize("function", [biased_attention, reference.biased_attention])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
def test_matches_materialised_bias(function, causal, masked, shared, Hkv):
    q, k, v, bias = inputs(Hkv=Hkv, shared=shared)
    key_mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    key_mask = key_mask if masked else None
    out = function(q, k, v, **bias, offset=3, causal=causal, key_mask=key_mask, scale=0.3)
    wanted = by_sdpa(q, k, v, materialised_bias(**bias, offset=3), causal, key_mask, 0.3)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("N, M", [(1, 1), (1, 7), (7, 1), (33, 17)])
@pytest.mark.parametrize("causal", [False, True])
def test_without_a_table_at_edge_shapes(N, M, causal):
    q, k, v, _ = inputs(N=N, M=M, D=3)
    out = biased_attention(q, k, v, causal=causal)
    torch.testing.assert_close(out, by_sdpa(q, k, v, causal=causal), rtol=1e-12, atol=1e-12)


def test_codes_mixed_between_shared_and_per_row():
    q, k, v, bias = inputs()
    bias["k_codes"] = bias["k_codes"][:1]
    out = biased_attention(q, k, v, **bias, offset=3)
    wanted = by_sdpa(q, k, v, materialised_bias(**bias, offset=3))
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_codes_at_their_limits_do_not_overflow():
    q, k, v, bias = inputs(N=2, M=2)
    bias["q_codes"] = torch.tensor([[BIG, -BIG]], dtype=torch.int32)
    bias["k_codes"] = torch.tensor([[-BIG, BIG]], dtype=torch.int32)
    out = biased_attention(q, k, v, **bias, offset=5)
    wanted = by_sdpa(q, k, v, materialised_bias(**bias, offset=5))
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_gradients():
    q, k, v, bias = inputs(B=2, N=3, M=4, D=2, T=5)
    key_mask = torch.tensor([[True, False, True, True], [False] * 4])  # row 1 sees nothing
    leaves = [x.requires_grad_() for x in (q, k, v, bias["table"])]

    def attend(q, k, v, table):
        return biased_attention(
            q, k, v, table=table, q_codes=bias["q_codes"], k_codes=bias["k_codes"],
            offset=2, causal=True, key_mask=key_mask,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_match_autograd_through_the_reference(shared):
    q, k, v, bias = inputs(B=3, N=33, M=17, shared=shared)
    leaves = [x.requires_grad_() for x in (q, k, v, bias["table"])]
    weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    ours, theirs = (
        torch.autograd.grad((function(q, k, v, **bias, causal=True) * weight).sum(), leaves)
        for function in (biased_attention, reference.biased_attention)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_second_derivative_is_refused():
    q, k, v, bias = inputs()
    q.requires_grad_()
    (first,) = torch.autograd.grad(biased_attention(q, k, v, **bias).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="biased_attention_backward cannot be differentiated"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(dtype):
    q, k, v, bias = inputs(N=33, M=17, dtype=dtype)
    exact = by_sdpa(q.double(), k.double(), v.double(),
                    materialised_bias(**bias, offset=0).double())  # fmt: skip
    out = biased_attention(q, k, v, **bias)
    assert out.dtype == dtype
    budget = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    assert (out.double() - exact).abs().max() <= budget


def test_rows_that_see_nothing_are_zero_with_zero_gradients():
    q, k, v, bias = inputs()
    leaves = [x.requires_grad_() for x in (q, k, v, bias["table"])]
    out = biased_attention(q, k, v, **bias, key_mask=torch.zeros(2, 7, dtype=torch.bool))
    assert out.eq(0).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.eq(0).all()


def test_no_keys_and_no_rows():
    q, k, v, _ = inputs(M=0)
    q.requires_grad_()
    out = biased_attention(q, k, v)
    out.sum().backward()
    assert out.eq(0).all() and q.grad.eq(0).all()
    q, k, v, bias = inputs(B=0)
    assert biased_attention(q, k, v, **bias).shape == q.shape


def test_a_masked_key_changes_nothing():
    q, k, v, bias = inputs()
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[:, 3] = False
    before = biased_attention(q, k, v, **bias, key_mask=key_mask)
    k[:, :, 3], v[:, :, 3] = 50.0, -50.0
    assert torch.equal(biased_attention(q, k, v, **bias, key_mask=key_mask), before)


def test_causal_sees_nothing_later():
    q, k, v, bias = inputs(N=7, M=7)
    before = biased_attention(q, k, v, **bias, causal=True)
    k[:, :, 4:], v[:, :, 4:] = 9.0, 9.0
    after = biased_attention(q, k, v, **bias, causal=True)
    assert torch.equal(after[:, :, :4], before[:, :, :4])
    assert not torch.allclose(after[:, :, 4:], before[:, :, 4:])


def test_large_scores_stay_finite():
    q, k, v, bias = inputs(dtype=torch.float32)
    out = biased_attention(q * 1e4, k * 1e4, v, **bias)
    assert out.isfinite().all()


def test_table_gradient_is_the_same_bits_every_run():
    q, k, v, bias = inputs(B=3, N=130, M=130, dtype=torch.float32)
    table = bias["table"].requires_grad_()
    grads = [
        torch.autograd.grad(biased_attention(q, k, v, **bias).square().sum(), table)[0]
        for _ in range(4)
    ]
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_autocast_does_not_round_the_sums():
    q, k, v, bias = inputs(dtype=torch.float32)
    wanted = biased_attention(q, k, v, **bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(biased_attention(q, k, v, **bias), wanted)


def test_results_have_the_layout_of_their_inputs():
    q, k, v, bias = inputs(H=4, Hkv=4, N=7, M=7)
    wanted = biased_attention(q, k, v, **bias)
    # as three slices of one projection leave them
    projected = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).contiguous().requires_grad_()
    views = [x.transpose(1, 2) for x in projected.unbind(2)]
    out = biased_attention(*views, **bias)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, wanted)
    for grad in torch.autograd.grad(out.sum(), views):
        assert grad.transpose(1, 2).is_contiguous()
    across = q.transpose(-1, -2).contiguous().transpose(-1, -2)  # rows that are not packed
    out = biased_attention(across, k, v, **bias)
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted)
    torch.library.opcheck(
        torch.ops.musiclm.biased_attention.default,
        (*views, None, None, None, 0, False, None, 0.3, 0.0, None, None, 1),
    )


def test_op_contracts():
    q, k, v, bias = inputs(dtype=torch.float32)
    table = bias["table"]
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    codes = (bias["q_codes"], bias["k_codes"])
    options = (0.2, torch.tensor(7), torch.full((4,), 9.0), 2)
    rest = (table.requires_grad_(), *codes, 3, True, key_mask, 0.3, *options)
    plain = (None, None, None, 0, False, None, 0.3, 0.0, None, None, 1)
    torch.library.opcheck(torch.ops.musiclm.biased_attention.default, leaves + rest)
    torch.library.opcheck(torch.ops.musiclm.biased_attention.default, leaves + plain)
    q, k, v = leaves = tuple(x.detach() for x in leaves)
    rest = (table.detach(), *rest[1:])
    out, lse = torch.ops.musiclm.biased_attention(*leaves, *rest)
    backward = torch.ops.musiclm.biased_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *leaves, out, lse, *rest, True))
    torch.library.opcheck(backward, (torch.ones_like(out), *leaves, out, lse, *rest, False))


def test_compiles_without_graph_break():
    q, k, v, bias = inputs(dtype=torch.float32)
    q.requires_grad_()
    bias["table"].requires_grad_()

    def attend(q, k, v, bias):
        return biased_attention(q, k, v, **bias, causal=True) * 2

    compiled = torch.compile(attend, fullgraph=True)
    leaves = (q, bias["table"])
    out, wanted = compiled(q, k, v, bias), attend(q, k, v, bias)
    torch.testing.assert_close(out, wanted)
    for one, other in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_of_queries_change_nothing(monkeypatch, causal, shared):
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 4 * 17 * 8)
    monkeypatch.setattr(blocked, "MIN_QUERIES", 3)
    q, k, v, bias = inputs(B=3, N=23, M=17, shared=shared)
    key_mask = torch.rand(3, 17, generator=torch.Generator().manual_seed(1)) > 0.4
    leaves = [x.requires_grad_() for x in (q, k, v, bias["table"])]
    results = []
    for function in (biased_attention, reference.biased_attention):
        out = function(
            q, k, v, **bias, causal=causal, key_mask=key_mask, dropout=0.3, dropout_seed=5
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_no_tensor_of_all_pairs_of_a_head():
    N = 1024
    q, k, v, bias = inputs(B=2, H=2, Hkv=2, N=N, M=N, T=2 * N - 1, dtype=torch.float32)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    with Largest() as largest:
        out, lse = blocked.attention_and_lse(
            q, k, v, bias["table"], bias["q_codes"], bias["k_codes"], N, False, None, 0.3,
            0.0, None, None, 1,
        )  # fmt: skip
        blocked.attention_backward(
            q, q, k, v, out, lse, bias["table"], bias["q_codes"], bias["k_codes"], N, False, None,
            0.3, 0.0, None, None, 1, True,
        )  # fmt: skip
    assert 0 < largest.numel <= blocked.BLOCK_SCORES < N * N


def test_dropout_is_the_documented_choice():
    q, k, v, bias = inputs(B=2, H=4, N=50, M=70, D=8, T=11)
    seed, rate = 2**40 + 3, 0.25
    out = biased_attention(q, k, v, **bias, offset=3, dropout=rate, dropout_seed=seed)
    weights = materialised_bias(**bias, offset=3)
    keys = k.repeat_interleave(2, dim=1)
    weights = (q @ keys.mT * 8**-0.5 + weights).softmax(-1)
    for b, h, i, j in [(0, 0, 0, 0), (1, 3, 49, 69), (1, 2, 7, 31)]:
        words = philox_4x32(
            tuple(torch.tensor(c) for c in (j, i, b * 4 + h, 0)),
            (torch.tensor(seed & WORD), torch.tensor(seed >> 32)),
        )
        kept = (words[0].item() >> 1) >= rate * 2**31
        # the output's slope in the value of that pair is the weight after dropout
        leaf = v.clone().requires_grad_()
        (slope,) = torch.autograd.grad(
            biased_attention(q, k, leaf, **bias, offset=3, dropout=rate, dropout_seed=seed)[
                b, h, i, 0
            ],
            leaf,
        )
        wanted = weights[b, h, i, j] / (1 - rate) if kept else 0.0
        torch.testing.assert_close(slope[b, h // 2, j, 0].item(), float(wanted))
    assert not torch.equal(out, biased_attention(q, k, v, **bias, offset=3))


def test_dropout_keeps_the_mean_and_gradients_are_exact():
    q, k, v, bias = inputs(B=1, H=2, Hkv=2, N=3, M=5, D=2, T=5)
    outs = [biased_attention(q, k, v, **bias, dropout=0.4, dropout_seed=s) for s in range(2000)]
    mean = torch.stack(outs).mean(0)
    plain = biased_attention(q, k, v, **bias)
    assert (mean - plain).abs().max() < 0.15
    leaves = [x.requires_grad_() for x in (q, k, v, bias["table"])]

    def attend(q, k, v, table):
        codes = {"q_codes": bias["q_codes"], "k_codes": bias["k_codes"]}
        return biased_attention(q, k, v, table=table, **codes, dropout=0.4, dropout_seed=9)

    assert torch.autograd.gradcheck(attend, leaves)


def test_dropout_without_a_seed_follows_torchs_generator():
    q, k, v, bias = inputs()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(biased_attention(q, k, v, **bias, dropout=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    seed = torch.tensor(77)
    assert torch.equal(
        biased_attention(q, k, v, **bias, dropout=0.5, dropout_seed=seed),
        biased_attention(q, k, v, **bias, dropout=0.5, dropout_seed=77),
    )


@pytest.mark.parametrize(
    "change, name",
    [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 0.1, "dropout_seed": torch.zeros(2)}, "dropout_seed has shape"),
        ({"dropout": 0.1, "dropout_seed": torch.tensor(1.0)}, "dropout_seed is torch.float32"),
        ({"score_bound": torch.zeros(3)}, "score_bound has shape"),
        ({"grid_rows": 0}, "grid_rows is 0"),
        ({"q": torch.zeros(2, 4, 5)}, "q has shape"),
        ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int64)}, "q is torch.int64"),
        ({"k": torch.zeros(2, 3, 7, 8)}, "k has 3 heads"),
        ({"v": torch.zeros(2, 2, 6, 8)}, "v has shape"),
        ({"k": torch.zeros(2, 2, 7, 8).half()}, "k is torch.float16"),
        ({"k": torch.zeros(2, 2, 7, 8, device="meta")}, "k is on meta"),
        ({"table": None}, "q_codes is given without a table"),
        ({"table": torch.zeros(3, 11)}, "table has shape"),
        ({"table": torch.zeros(4, 0)}, "table has shape"),
        ({"table": torch.zeros(4, 11).half()}, "table is torch.float16, wanted torch.float32$"),
        ({"scale": math.nan}, "scale is nan"),
        ({"scale": math.inf}, "scale is inf"),
        ({"q_codes": None}, "q_codes is None"),
        ({"k_codes": None}, "k_codes is None"),
        ({"q_codes": torch.zeros(2, 5, dtype=torch.int64)}, "q_codes is torch.int64"),
        ({"k_codes": torch.zeros(3, 7, dtype=torch.int32)}, "k_codes has shape"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, "key_mask has shape"),
        ({"key_mask": torch.ones(2, 7)}, "key_mask is torch.float32"),
    ],
)
def test_refusals(change, name):
    q, k, v, bias = inputs(dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, **bias} | change
    with pytest.raises(ValueError, match=name):
        biased_attention(**arguments)
