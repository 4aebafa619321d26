"""The kernel of attention over a cache: on CPU in the interpreter."""

from contextlib import nullcontext

import pytest
import torch

from musiclm_kernels import decode_attention, implementations, reference
from musiclm_kernels.testing import through_kernels
from tests.ops.decode_cases import inputs, to_float64

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])
LENGTHS = [0, 1, 127, 128, 129, 300]  # about the sides of a split, and of the cache
ALL = {"masked": True, "null": True}


def running_kernels():
    """On a GPU the op runs its kernel as it is; without one, in Triton's interpreter."""
    if GPU:
        return nullcontext()
    pytest.importorskip("triton")
    return through_kernels()


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def case(lengths=LENGTHS, S=300, T=11, **options):
    """Inputs on the device, with every slot that no row may use poisoned."""
    given = inputs(B=len(lengths), S=S, T=T, **options)
    given["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    hidden = torch.arange(S) >= given["lengths"][:, None]
    if "key_mask" in given:
        hidden |= ~given["key_mask"]
    for name in ("k_cache", "v_cache"):
        cache = given[name]
        if cache.dtype != torch.float8_e4m3fn:
            cache[hidden[:, None].expand(cache.shape[:3])] = torch.nan
    return {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in given.items()}


def run(given):
    counters = torch.zeros(given["q"].shape[0] * given["q"].shape[1], dtype=torch.int32).to(DEVICE)
    with running_kernels():
        out = decode_attention(**given, counters=counters)
    assert not counters.any()
    return out


def assert_within_budget(given):
    """Against float64, at most twice what the definition errs in this dtype, and two roundings of
    the largest value: the result's, and that of the weights before they multiply the values."""
    out = run(given)
    exact = reference.decode_attention(**to_float64(given))
    plain = reference.decode_attention(**given)
    assert out.dtype == plain.dtype and out.shape == exact.shape
    largest = exact.abs().max().item()
    own = (plain - exact).abs().max().item()
    error = (out - exact).abs().max().item()
    assert error <= 2 * own + 2 * torch.finfo(out.dtype).eps * largest, f"{error}, {own}"
    return out


def test_there_is_a_kernel():
    assert implementations()["decode_attention"]["cuda"] == "triton"


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("options", [{}, {"biased": False}, {"shared": True}, ALL])
def test_kernel(poisoned, dtype, heads, options):
    H, Hkv = heads
    assert_within_budget(case(H=H, Hkv=Hkv, D=32, dtype=dtype, **options))


@pytest.mark.parametrize("D", [1, 16, 20, 80, 128, 256])
@pytest.mark.parametrize("Hkv", [1, 2])
def test_kernel_at_every_width(poisoned, D, Hkv):
    lengths = [0, 63, 200]
    assert_within_budget(case(lengths, S=200, H=2, Hkv=Hkv, D=D, dtype=torch.float16, **ALL))
    if D in (20, 256):
        assert_within_budget(case(lengths, S=200, H=2, Hkv=Hkv, D=D, dtype=torch.float32))


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 400])
@pytest.mark.parametrize("Hkv", [1, 2])
def test_kernel_with_a_window(poisoned, window, Hkv):
    given = case(H=2, Hkv=Hkv, D=16, dtype=torch.float16) | {"window": window}
    if window < 128:  # slots that it leaves behind are not read, either
        for b, length in enumerate(LENGTHS):
            given["v_cache"][b, :, : max(0, length - window)] = torch.nan
    out = run(given)
    given["v_cache"] = given["v_cache"].nan_to_num()
    plain = reference.decode_attention(**given)
    torch.testing.assert_close(out, plain, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("Hkv", [1, 2])
@pytest.mark.parametrize("options", [{}, ALL])
def test_kernel_with_float8(poisoned, dtype, Hkv, options):
    given = case(H=2, Hkv=Hkv, D=32, dtype=dtype, float8=True, **options)
    for name in ("k_scales", "v_scales"):
        given[name][:, :, ::7] *= 1e-6  # fp16 would lose what a weight times this is
        hidden = torch.arange(300, device=DEVICE) >= given["lengths"][:, None]
        given[name][hidden[:, None].expand(-1, Hkv, -1)] = torch.nan
    assert_within_budget(given)


def test_kernel_keeps_float8_values_of_any_size(poisoned):
    given = case(H=2, Hkv=1, D=32, dtype=torch.float16, float8=True, biased=False)
    given["v_scales"] *= 1e-5
    assert_within_budget(given)


@pytest.mark.parametrize("offset", [-(2**20), 2**20, 5])
@pytest.mark.parametrize("Hkv", [1, 2])
def test_kernel_cuts_indices_to_the_table(poisoned, offset, Hkv):
    given = case([140, 7], S=140, H=2, Hkv=Hkv, D=16, dtype=torch.float16)
    given["q_code"] = torch.tensor([2**30, -(2**30)], dtype=torch.int32, device=DEVICE)
    given["k_codes"][:, ::2] = -(2**30)
    given["k_codes"][:, 1::2] = 2**30
    assert_within_budget(given | {"offset": offset})


@pytest.mark.parametrize("Hkv", [1, 2])
def test_kernel_reads_caches_through_their_strides(poisoned, Hkv):
    given = case(H=2, Hkv=Hkv, D=16, dtype=torch.float16)
    wanted = run(given)
    k, v = given["k_cache"], given["v_cache"]
    layers = torch.full((3, *k.shape), torch.nan, dtype=k.dtype, device=DEVICE)
    layers[1] = k
    by_slot = torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format)
    by_slot.copy_(v.transpose(1, 2))
    q = torch.stack((given["q"], given["q"]), 1)[:, 1]
    views = {"k_cache": layers[1], "v_cache": by_slot.transpose(1, 2), "q": q}
    assert torch.equal(run(given | views), wanted)
    columns = given["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(given | {"q": columns}), wanted)


@pytest.mark.parametrize("Hkv", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_is_the_same_bits_alone_and_beside_any_others(Hkv, dtype):
    given = case(H=2, Hkv=Hkv, D=16, dtype=dtype, **ALL)
    together = run(given)
    per_row = ("q", "k_cache", "v_cache", "q_code", "k_codes", "key_mask", "lengths")
    for b in (1, 4, 5):
        own = given | {name: given[name][b : b + 1] for name in per_row}
        assert torch.equal(run(own), together[b : b + 1])
    others = given | {name: given[name].clone() for name in per_row}
    others["q"][:5] *= 2
    others["lengths"][:5] = 300
    others["k_cache"], others["v_cache"] = (others[x].nan_to_num(0.5) for x in per_row[1:3])
    assert torch.equal(run(others)[5], together[5])


def test_splits_are_merged_a_few_at_a_time(poisoned):
    given = case([2500, 2433, 40], S=2500, H=4, Hkv=1, D=64, dtype=torch.float16)
    assert_within_budget(given)
    assert_within_budget(given | {"window": 1300})


def test_counters_may_be_longer_and_are_made_if_none_are_given(poisoned):
    given = case(H=2, Hkv=2, D=16, dtype=torch.float32)
    wanted = run(given)
    counters = torch.zeros(100, dtype=torch.int32, device=DEVICE)
    with running_kernels():
        assert torch.equal(decode_attention(**given), wanted)
        for _ in range(2):
            assert torch.equal(decode_attention(**given, counters=counters), wanted)
    assert not counters.any()


def test_no_rows_and_no_slots(poisoned):
    given = case([0, 0], S=0, H=2, Hkv=2, D=16, dtype=torch.float32, biased=False, null=True)
    torch.testing.assert_close(run(given), given["null_kv"][1].expand(2, -1, -1))
    del given["null_kv"]
    assert not run(given).any()
    given |= {name: given[name][:0] for name in ("q", "k_cache", "v_cache", "lengths")}
    assert run(given).shape == (0, 2, 16)


@pytest.mark.parametrize("Hkv", [1, 2])
def test_op_contract_of_the_kernel(Hkv):
    given = case([9, 200], S=200, H=2, Hkv=Hkv, D=16, dtype=torch.float32, **ALL)
    names = ("q", "k_cache", "v_cache", "lengths", "table", "q_code", "k_codes", "offset", "scale",
             "key_mask", "null_kv", "k_scales", "v_scales", "window", "counters")  # fmt: skip
    given |= {"scale": 0.3, "counters": torch.zeros(4, dtype=torch.int32, device=DEVICE)}
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].nan_to_num()
    with running_kernels():
        torch.library.opcheck(
            torch.ops.musiclm.decode_attention.default, [given.get(name) for name in names]
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"D": 257}, "k_cache has width 257, wanted at most 256 on CUDA"),
        ({"columns": True}, r"k_cache has strides \(.*\), wanted 1 at last on CUDA"),
    ],
)
def test_kernel_refuses(change, message):
    given = case([3], S=4, H=2, Hkv=2, D=change.get("D", 16), dtype=torch.float32)
    if "columns" in change:
        given["k_cache"] = given["k_cache"].mT.contiguous().mT
    with running_kernels(), pytest.raises(ValueError, match=message):
        decode_attention(**given)


@pytest.mark.parametrize("layout", ["strided", "shared"])
def test_lengths_of_any_layout(layout):
    given = case([40, 40], S=40, H=2, Hkv=2, D=16, dtype=torch.float32)
    wanted = run(given)
    lengths = given["lengths"]
    between = torch.full_like(lengths, 3)  # which nobody is to read
    spread = (
        torch.stack((lengths, between), 1)[:, 0] if layout == "strided" else lengths[:1].expand(2)
    )
    assert torch.equal(run(given | {"lengths": spread}), wanted)


@pytest.mark.parametrize(("arch", "knows"), [(80, False), (86, False), (89, True), (90, True)])
def test_float8_needs_a_gpu_that_knows_it(monkeypatch, arch, knows):
    launch = pytest.importorskip("musiclm_kernels.decode.launch")
    monkeypatch.setattr("musiclm_kernels.target.compute_capability", lambda tensor: arch)
    cache = torch.zeros(1, 1, 4, 8).to(torch.float8_e4m3fn)
    if knows:
        launch.check_caches(cache, cache)
        return
    with pytest.raises(ValueError, match="k_cache is .*, wanted a GPU from 8.9 on"):
        launch.check_caches(cache, cache)
