import math
from functools import partial

import pytest
import torch

from musiclm_kernels import biased_attention, decode_attention, reference
from musiclm_kernels.decode.reference import quantize_rows
from tests.ops.decode_cases import by_loops, inputs, to_float64

OPTIONS = {
    "plain": {"biased": False},
    "own codes": {},
    "shared codes": {"shared": True},
    "masked": {"masked": True},
    "null": {"null": True},
    "masked null": {"masked": True, "null": True, "biased": False},
    "float8": {"float8": True, "dtype": torch.float32},
    "float8 masked null": {"float8": True, "masked": True, "null": True, "dtype": torch.float32},
}


def traced(**arguments):
    """What torch.compile sees of it on a CPU."""
    graph = torch.compile(partial(decode_attention, **arguments), fullgraph=True, backend="eager")
    return graph()


@pytest.mark.parametrize("function", [decode_attention, reference.decode_attention, traced])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (4, 4, 4), (1, 9, 5), (0, 3, 2), (0, 0, 0)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_matches_loops(function, lengths, options, window):
    torch._dynamo.reset()
    given = inputs(**options)
    given |= {"lengths": torch.tensor(lengths, dtype=torch.int32), "scale": 0.3, "window": window}
    out = function(**given)
    exact = by_loops(**given)
    tolerance = 1e-12 if out.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("Hkv", [1, 2, 4])
@pytest.mark.parametrize("S", [1, 9])
def test_key_heads_are_shared(Hkv, S):
    given = inputs(Hkv=Hkv, S=S, null=True) | {"lengths": torch.tensor([S, 0, 1])}
    torch.testing.assert_close(decode_attention(**given), by_loops(**given))


def poison(given, lengths):
    """What no row may use: slots past its length, and those that its mask hides."""
    hidden = torch.arange(9) >= lengths[:, None]
    if "key_mask" in given:
        hidden |= ~given["key_mask"]
    place = hidden[:, None].expand(-1, 2, -1)
    given["k_cache"][place], given["v_cache"][place] = torch.nan, torch.inf
    for name in ("k_scales", "v_scales"):
        if name in given:
            given[name][place] = torch.nan
    if "k_codes" in given:
        given["k_codes"][hidden] = 2**31 - 1


@pytest.mark.parametrize("function", [decode_attention, reference.decode_attention, traced])
@pytest.mark.parametrize("options", ["plain", "own codes", "masked", "float8 masked null"])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (0, 6, 2)])
def test_what_is_not_attended_does_not_leak(function, lengths, options):
    torch._dynamo.reset()
    given = inputs(**{"dtype": torch.float32} | OPTIONS[options])
    lengths = torch.tensor(lengths)
    before = function(**given, lengths=lengths)
    if "k_scales" in given:  # PyTorch does not index float8
        for name in ("k_cache", "v_cache"):
            given[name] = given[name].float()
        poison(given, lengths)
        for name in ("k_cache", "v_cache"):
            given[name] = given[name].to(torch.float8_e4m3fn)
    else:
        poison(given, lengths)
    after = function(**given, lengths=lengths)
    assert torch.equal(after, before) and after.isfinite().all()


def test_is_attention_with_one_query():
    given = inputs(masked=True) | {"lengths": torch.tensor([9, 2, 5])}
    wanted = biased_attention(
        given["q"][:, :, None], given["k_cache"], given["v_cache"], table=given["table"],
        q_codes=given["q_code"][:, None], k_codes=given["k_codes"], offset=2,
        key_mask=(torch.arange(9) < given["lengths"][:, None]) & given["key_mask"],
    )  # fmt: skip
    torch.testing.assert_close(decode_attention(**given), wanted[:, :, 0])


def test_a_null_key_is_a_slot_before_all_others():
    given = inputs(biased=False, null=True) | {"lengths": torch.tensor([9, 2, 0])}
    out = decode_attention(**given)
    null = given.pop("null_kv")
    for name, first in zip(("k_cache", "v_cache"), null, strict=True):
        given[name] = torch.cat((first[None, :, None].expand(3, -1, -1, -1), given[name]), 2)
    given["lengths"] += 1
    torch.testing.assert_close(out, decode_attention(**given))


def test_a_row_does_not_depend_on_its_batch():
    given = inputs(dtype=torch.float32, masked=True, null=True)
    lengths = torch.tensor([9, 2, 5])
    together = decode_attention(**given, lengths=lengths)
    for b in range(3):
        per_row = ("q", "k_cache", "v_cache", "q_code", "k_codes", "key_mask")
        own = given | {name: given[name][b : b + 1] for name in per_row}
        alone = decode_attention(**own, lengths=lengths[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone)


def test_codes_at_their_limits_do_not_overflow():
    given = inputs(B=1)
    given["q_code"] = torch.tensor([2**30], dtype=torch.int32)
    given["k_codes"] = torch.tensor([[-(2**30), 2**30, 0] * 3], dtype=torch.int32)
    given["lengths"] = torch.tensor([9])
    torch.testing.assert_close(decode_attention(**given), by_loops(**given))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", ["own codes", "masked null", "float8"])
def test_low_precision_rounds_once(dtype, options):
    given = inputs(**OPTIONS[options] | {"dtype": dtype})
    given["lengths"] = torch.tensor([9, 2, 5])
    exact = by_loops(**to_float64(given))
    out = decode_attention(**given)
    assert out.dtype == dtype
    budget = torch.finfo(dtype).eps * exact.abs().max() + 1e-6
    assert (out.double() - exact).abs().max() <= budget


def normal_heads(*shape, outlier_channels=0, factor=20.0):
    """Keys or values, a few channels of which are much larger than the others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x[..., :outlier_channels] *= factor
    return x


@pytest.mark.parametrize("outlier_channels", [0, 2])
def test_float8_costs_what_its_mantissa_does(outlier_channels):
    """Against caches in fp32: the root mean square error as a share of the result's. Rounding to
    three bits of mantissa errs by 2^-4 / sqrt(3) = 3.6 % at most, of each value and each product."""
    q = normal_heads(4, 8, 64)
    k = normal_heads(4, 8, 512, 64, outlier_channels=outlier_channels)
    v = normal_heads(4, 8, 512, 64).flip(0)
    q[..., :outlier_channels] /= 20  # as training leaves them: the scores stay in range
    lengths = torch.tensor([512, 300, 64, 7])
    exact = decode_attention(q, k, v, lengths)
    (k8, k_scales), (v8, v_scales) = quantize_rows(k), quantize_rows(v)
    out = decode_attention(q, k8, v8, lengths, k_scales=k_scales, v_scales=v_scales)
    error = ((out - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert 0.01 < error < 0.045


def test_a_slice_of_a_longer_cache_and_no_rows():
    given = inputs(biased=False)
    given["lengths"] = torch.tensor([9, 2, 5])
    wanted = decode_attention(**given)
    slices = {x: torch.cat([given[x], given[x]], 2)[:, :, :9] for x in ("k_cache", "v_cache")}
    torch.testing.assert_close(decode_attention(**given | slices), wanted)
    none = {name: tensor[:0] for name, tensor in given.items()}
    assert decode_attention(**none).shape == (0, 4, 8)


def test_op_contract():
    op = torch.ops.musiclm.decode_attention.default
    lengths = torch.tensor([9, 2, 5])
    names = ("table", "q_code", "k_codes", "offset", "scale", "key_mask", "null_kv", "k_scales",
             "v_scales", "window", "counters")  # fmt: skip
    for options in (OPTIONS["plain"], {"masked": True, "null": True}):  # it cannot multiply float8
        given = inputs(**{"dtype": torch.float32} | options)
        given |= {"scale": 0.3, "offset": 2}
        for more in ({}, {"window": 3, "counters": torch.zeros(12, dtype=torch.int32)}):
            rest = [(given | more).get(name) for name in names]
            caches = given["q"], given["k_cache"], given["v_cache"]
            torch.library.opcheck(op, (*caches, lengths, *rest))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(backend):
    given = inputs(dtype=torch.float32, masked=True, null=True)
    rest = {name: value for name, value in given.items() if name != "q"}

    def step(q, lengths, counters):
        return decode_attention(q, **rest, lengths=lengths, counters=counters) * 2

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    counters = torch.zeros(12, dtype=torch.int32)
    for lengths in ([9, 2, 5], [0, 9, 1]):  # one graph: no shape follows what a tensor holds
        arguments = given["q"], torch.tensor(lengths), counters
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_compiled_under_autocast_is_not_rounded():
    given = inputs(dtype=torch.float32, biased=False) | {"lengths": torch.tensor([9, 2, 5])}
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        inside = traced(**given)
    torch.testing.assert_close(inside, decode_attention(**given))


def float8(*shape):
    return torch.zeros(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"q": torch.zeros(3, 4, 1, 8)}, "q has shape"),
        ({"k_cache": torch.zeros(3, 3, 9, 8)}, "k_cache has 3 heads"),
        ({"k_cache": torch.zeros(3, 2, 9, 7)}, "k_cache has shape"),
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
        ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, "key_mask has shape"),
        ({"key_mask": torch.ones(3, 9)}, "key_mask is torch.float32"),
        ({"null_kv": torch.zeros(2, 4, 8)}, r"null_kv has shape \(2, 4, 8\), wanted \(2, 2, 8\)"),
        ({"null_kv": torch.zeros(2, 2, 8).half()}, "null_kv is torch.float16"),
        ({"window": 0}, "window is 0, wanted at least 1"),
        ({"k_scales": torch.ones(3, 2, 9)}, "k_scales is given without float8 caches"),
        ({"k_cache": float8(3, 2, 9, 8)}, "v_cache is torch.float32, wanted torch.float8"),
        (
            {"k_cache": float8(3, 2, 9, 8), "v_cache": float8(3, 2, 9, 8)},
            r"k_scales is None, wanted \(3, 2, 9\) float32",
        ),
        ({"counters": torch.zeros(11, dtype=torch.int32)}, "counters has shape"),
        ({"counters": torch.zeros(12, dtype=torch.int64)}, "counters is torch.int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int32, device="meta")}, "lengths is on meta"),
    ],
)
def test_refusals(change, name):
    given = inputs(dtype=torch.float32) | {"lengths": torch.tensor([9, 2, 5])} | change
    with pytest.raises(ValueError, match=name):
        decode_attention(**given)
