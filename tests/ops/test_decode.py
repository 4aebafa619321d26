import math

import pytest
import torch

from musiclm_kernels import biased_attention, decode_attention, reference


def inputs(B=3, H=4, Hkv=2, S=9, D=8, T=11, dtype=torch.float64, shared=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def codes(*shape):
        return torch.randint(0, 9, shape, generator=generator, dtype=torch.int32)

    wide = torch.promote_types(dtype, torch.float32)
    bias = {
        "table": draw(H, T).to(wide),
        "q_code": codes(B),
        "k_codes": codes(1 if shared else B, S),
    }
    return draw(B, H, D), draw(B, Hkv, S, D), draw(B, Hkv, S, D), bias


def by_loops(q, k_cache, v_cache, lengths, scale, table=None, q_code=None, k_codes=None, offset=0):
    B, H, _ = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            head = h // (H // k_cache.shape[1])
            scores = []
            for j in range(int(lengths[b])):
                score = scale * q[b, h].dot(k_cache[b, head, j])
                if table is not None:
                    row = b if len(k_codes) > 1 else 0
                    entry = q_code[b].item() - k_codes[row, j].item() + offset
                    score = score + table[h, min(max(entry, 0), table.shape[1] - 1)]
                scores.append(score)
            if scores:
                weights = torch.stack(scores).softmax(0)
                out[b, h] = weights @ v_cache[b, head, : len(scores)]
    return out


@pytest.mark.parametrize("function", [decode_attention, reference.decode_attention])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (4, 4, 4), (1, 9, 5), (0, 3, 2), (0, 0, 0)])
@pytest.mark.parametrize("Hkv", [1, 2, 4])
@pytest.mark.parametrize("biased", [None, "own codes", "shared codes"])
def test_matches_loops(function, lengths, Hkv, biased):
    q, k, v, bias = inputs(Hkv=Hkv, shared=biased == "shared codes")
    bias = bias | {"offset": 2} if biased else {}
    lengths = torch.tensor(lengths, dtype=torch.int32)
    out = function(q, k, v, lengths, scale=0.3, **bias)
    torch.testing.assert_close(out, by_loops(q, k, v, lengths, 0.3, **bias))


@pytest.mark.parametrize("lengths", [(4, 4, 4), (0, 6, 2)])
def test_what_lies_beyond_a_length_does_not_leak(lengths):
    q, k, v, bias = inputs(dtype=torch.float32)
    lengths = torch.tensor(lengths)
    before = decode_attention(q, k, v, lengths, **bias)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.inf
    after = decode_attention(q, k, v, lengths, **bias)
    assert torch.equal(after, before) and after.isfinite().all()


def test_is_attention_with_one_query():
    q, k, v, bias = inputs()
    lengths = torch.tensor([9, 2, 5])
    out = decode_attention(q, k, v, lengths, **bias)
    wanted = biased_attention(
        q[:, :, None], k, v, table=bias["table"], q_codes=bias["q_code"][:, None],
        k_codes=bias["k_codes"], key_mask=torch.arange(9) < lengths[:, None],
    )  # fmt: skip
    torch.testing.assert_close(out, wanted[:, :, 0])


def test_a_row_does_not_depend_on_its_batch():
    q, k, v, bias = inputs(dtype=torch.float32)
    lengths = torch.tensor([9, 2, 5])
    together = decode_attention(q, k, v, lengths, **bias)
    for b in range(3):
        row = slice(b, b + 1)
        alone = decode_attention(
            q[row], k[row], v[row], lengths[row], table=bias["table"],
            q_code=bias["q_code"][row], k_codes=bias["k_codes"][row],
        )  # fmt: skip
        torch.testing.assert_close(together[row], alone)


def test_codes_at_their_limits_do_not_overflow():
    q, k, v, bias = inputs(B=1)
    bias["q_code"] = torch.tensor([2**30], dtype=torch.int32)
    bias["k_codes"] = torch.tensor([[-(2**30), 2**30, 0] * 3], dtype=torch.int32)
    lengths = torch.tensor([9])
    out = decode_attention(q, k, v, lengths, **bias, scale=1.0)
    torch.testing.assert_close(out, by_loops(q, k, v, lengths, 1.0, **bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_rounds_once(dtype):
    q, k, v, bias = inputs(dtype=dtype)
    lengths = torch.tensor([9, 2, 5])
    wide_bias = bias | {"table": bias["table"].double()}
    exact = by_loops(q.double(), k.double(), v.double(), lengths, 0.3, **wide_bias)
    out = decode_attention(q, k, v, lengths, **bias, scale=0.3)
    assert out.dtype == dtype
    budget = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    assert (out.double() - exact).abs().max() <= budget


def test_a_slice_of_a_longer_cache_and_no_rows():
    q, k, v, _ = inputs()
    long_k, long_v = (torch.cat([x, x], 2)[:, :, :9] for x in (k, v))
    lengths = torch.tensor([9, 2, 5])
    wanted = decode_attention(q, k, v, lengths)
    torch.testing.assert_close(decode_attention(q, long_k, long_v, lengths), wanted)
    assert decode_attention(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 4, 8)


def test_op_contract():
    q, k, v, bias = inputs(dtype=torch.float32)
    lengths = torch.tensor([9, 2, 5])
    op = torch.ops.musiclm.decode_attention.default
    torch.library.opcheck(op, (q, k, v, lengths, *bias.values(), 2, 0.3))
    torch.library.opcheck(op, (q, k, v, lengths, None, None, None, 0, 0.3))


def test_compiles_without_graph_break():
    q, k, v, bias = inputs(dtype=torch.float32)
    lengths = torch.tensor([9, 2, 5])
    compiled = torch.compile(
        lambda q, lengths: decode_attention(q, k, v, lengths, **bias) * 2, fullgraph=True
    )
    wanted = decode_attention(q, k, v, lengths, **bias) * 2
    torch.testing.assert_close(compiled(q, lengths), wanted)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"q": torch.zeros(3, 4, 1, 8)}, "q has shape"),
        ({"k_cache": torch.zeros(3, 3, 9, 8)}, "k_cache has 3 heads"),
        ({"v_cache": torch.zeros(3, 2, 8, 8)}, "v_cache has shape"),
        ({"v_cache": torch.zeros(3, 2, 9, 8).half()}, "v_cache is torch.float16"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "lengths has shape"),
        ({"lengths": torch.zeros(3)}, "lengths is torch.float32"),
        ({"lengths": torch.tensor([1, 10, 2])}, "lengths span 1 to 10, wanted 0 to 9"),
        ({"lengths": torch.tensor([1, -1, 2])}, "lengths span -1 to 2"),
        ({"table": None}, "q_code is given without a table"),
        ({"table": torch.zeros(4)}, "table has shape"),
        ({"table": torch.zeros(4, 11).half()}, "table is torch.float16, wanted torch.float32$"),
        ({"scale": math.nan}, "scale is nan"),
        ({"q_code": None}, "q_code is None"),
        ({"k_codes": None}, "k_codes is None"),
        ({"q_code": torch.zeros(3, 1, dtype=torch.int32)}, "q_code has shape"),
        ({"k_codes": torch.zeros(3, 9, dtype=torch.int64)}, "k_codes is torch.int64"),
    ],
)
def test_refusals(change, name):
    q, k, v, bias = inputs(dtype=torch.float32)
    lengths = torch.tensor([9, 2, 5])
    arguments = {"q": q, "k_cache": k, "v_cache": v, "lengths": lengths, **bias} | change
    with pytest.raises(ValueError, match=name):
        decode_attention(**arguments)
