"""Writing into the cache, and a cache that is a ring."""

from contextlib import nullcontext

import pytest
import torch

from musiclm_kernels import decode_attention, implementations
from musiclm_kernels.decode import append_to_cache, reference
from musiclm_kernels.testing import through_kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FLOAT8 = torch.float8_e4m3fn
B, H, S = 4, 3, 24


def running_kernels():
    """On a GPU the op runs its kernel as it is; without one, in Triton's interpreter."""
    if GPU:
        return nullcontext()
    pytest.importorskip("triton")
    return through_kernels()


def inputs(N, D=20, dtype=torch.float32, cache=None, positions=(0, -1, 20, 100)):
    """A layer of keys and of values, the latter laid out by slots; new tokens; and where they go."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    k, v = draw(B, H, N, D), draw(B, N, H, D).transpose(1, 2)
    if N:
        k[0, 0, 0], v[2, 1, -1] = 0, 1e-40  # the smallest: a scale of 1
    caches = draw(3, B, H, S, D).to(cache or dtype)[1], draw(B, S, H, D).to(cache or dtype)
    given = {"k_cache": caches[0], "v_cache": caches[1].transpose(1, 2), "k": k, "v": v}
    given["positions"] = torch.tensor(positions, device=DEVICE)
    if cache == FLOAT8:
        given |= {n: torch.rand(B, H, S, device=DEVICE) for n in ("k_scales", "v_scales")}
    return given


def copied(given):
    """The same, in memory of its own, laid out alike."""
    return {name: tensor.clone() for name, tensor in given.items()}


def by_loops(given):
    wanted = copied(given)
    for name in ("k", "v"):
        cache, scales = wanted[f"{name}_cache"], wanted.get(f"{name}_scales")
        values = cache.float() if cache.dtype == FLOAT8 else cache
        for b, position in enumerate(given["positions"].tolist()):
            for h in range(H):
                for n in range(given[name].shape[2]):
                    if position < 0:
                        continue
                    slot, row = (position + n) % S, given[name][b, h, n]
                    if scales is not None:
                        row = row.float()
                        largest = row.abs().max() / 448
                        scales[b, h, slot] = largest if largest >= 2**-126 else 1.0
                        row = (row / scales[b, h, slot]).to(FLOAT8).float()
                    values[b, h, slot] = row
        wanted[f"{name}_cache"] = values.to(cache.dtype)
    return wanted


def assert_same(given, wanted):
    for name, tensor in given.items():
        assert torch.equal(tensor.float(), wanted[name].float()), name


CACHES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float64, None),
    (torch.float32, FLOAT8),
    (torch.bfloat16, FLOAT8),
]


@pytest.mark.parametrize("function", [append_to_cache, reference.append_to_cache])
@pytest.mark.parametrize("dtype, cache", CACHES)
@pytest.mark.parametrize("N", [0, 1, 5, S])
def test_matches_loops(function, dtype, cache, N):
    given = inputs(N, dtype=dtype, cache=cache)
    wanted = by_loops(given)
    assert function(**given) is None
    assert_same(given, wanted)


def test_what_is_stored_in_float8_is_within_its_rounding():
    given = inputs(5, cache=FLOAT8, positions=(0, 0, 0, 0))
    append_to_cache(**given)
    stored = given["k_cache"][:, :, :5].float() * given["k_scales"][:, :, :5, None]
    error = (stored - given["k"]).abs()
    # half a step of three bits; below 2^-6 of the scale the steps are as wide as there
    assert (error <= given["k"].abs() * 2**-4 + given["k_scales"][:, :, :5, None] * 2**-10).all()


@pytest.mark.parametrize("dtype, cache", [(torch.float32, None), (torch.float32, FLOAT8)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_break(backend, dtype, cache):
    given = inputs(2, dtype=dtype, cache=cache)
    q = torch.randn(B, H, 20, device=DEVICE)
    scales = {name: given[name] for name in given if name.endswith("_scales")}

    def step(k_cache, v_cache, k, v, positions, q, scales):
        append_to_cache(k_cache, v_cache, k * 2, v, positions, **scales)
        lengths = (positions + 2).clamp(0, S)
        return decode_attention(q, k_cache, v_cache, lengths, **scales)

    arguments = [given[name] for name in ("k_cache", "v_cache", "k", "v", "positions")]
    theirs = copied(given)
    own = [theirs[name] for name in ("k_cache", "v_cache", "k", "v", "positions")]
    out = step(*arguments, q, scales)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    again = compiled(*own, q, {name: theirs[name] for name in scales})
    torch.testing.assert_close(again, out)
    assert_same(given, theirs)


@pytest.mark.parametrize("cache", [None, FLOAT8])
def test_op_contract(cache):
    given = inputs(2, cache=cache)
    names = ("k_cache", "v_cache", "k", "v", "positions", "k_scales", "v_scales")
    some = {"test_utils": "test_faketensor"} if cache == FLOAT8 else {}  # it cannot compare float8
    arguments = [given.get(name) for name in names]
    torch.library.opcheck(torch.ops.musiclm.append_to_cache.default, arguments, **some)


def ring_and_line(run, dtype, Hkv, window, step, capacity):
    """Attention, token by token, over a ring of `window` slots, and over a long cache's last ones."""
    generator = torch.Generator().manual_seed(0)
    batch, D, T, steps = 2, 16, 50, 3 * window
    shape = (batch, Hkv, steps, D)
    k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    q = torch.randn(steps, batch, 2, D, generator=generator).to(DEVICE, dtype)
    table = torch.randn(2, T, generator=generator).to(DEVICE)
    codes = torch.arange(steps, dtype=torch.int32, device=DEVICE)[None]
    line = torch.full((2, batch, Hkv, capacity, D), torch.nan, dtype=dtype, device=DEVICE)
    ring = torch.full((2, batch, Hkv, window, D), torch.nan, dtype=dtype, device=DEVICE)
    ring_codes = torch.zeros(1, window, dtype=torch.int32, device=DEVICE)
    for t in range(0, steps, step):
        positions = torch.full((batch,), t, dtype=torch.int32, device=DEVICE)
        new = k[:, :, t : t + step], v[:, :, t : t + step]
        ring_codes[0, torch.arange(t, t + step) % window] = codes[0, t : t + step]
        with run():
            append_to_cache(*line, *new, positions)
            append_to_cache(*ring, *new, positions)
        lengths = positions + step
        bias = {"table": table, "q_code": lengths - 1, "offset": 3}
        with run():
            yield (
                decode_attention(q[t], *ring, lengths.clamp(max=window), k_codes=ring_codes, **bias),
                decode_attention(
                    q[t], *line, lengths, window=window, **bias,
                    k_codes=codes[:, :capacity],
                ),
            )  # fmt: skip


@pytest.mark.parametrize("step", [1, 3])
def test_a_ring_is_a_window_of_a_long_cache(step):
    pairs = ring_and_line(nullcontext, torch.float64, 2, window=12, step=step, capacity=36)
    for over_ring, over_line in pairs:
        torch.testing.assert_close(over_ring, over_line)


# The kernel: on CPU in the interpreter.


def test_there_is_a_kernel():
    assert implementations()["append_to_cache"]["cuda"] == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [1, 20, 64, 256])
@pytest.mark.parametrize("N", [0, 1, 5, S])
def test_kernel(dtype, D, N):
    given = inputs(N, D=D, dtype=dtype)
    wanted = by_loops(given)
    with running_kernels():
        append_to_cache(**given)
    assert_same(given, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("N", [1, 5])
def test_kernel_with_float8(dtype, N):
    given = inputs(N, dtype=dtype, cache=FLOAT8)
    if not GPU:  # the interpreter's rounding is not a GPU's, so here is nothing to round
        for name in ("k", "v"):
            x = given[name].float().to(FLOAT8).float()
            x = torch.where(x.abs() < 2**-4, 1.0, x)
            x[..., 0] = 448
            x[0, 0, 0] = 0
            given[name] = (x / 256).to(dtype)
    wanted = by_loops(given)
    with running_kernels():
        append_to_cache(**given)
    assert_same(given, wanted)


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
def test_kernel_far_along_a_ring(positions):
    far = 2**31 - 2 if positions == torch.int32 else 2**40
    given = inputs(5, dtype=torch.float32, positions=(far, -far, 3, 23))
    given["positions"] = given["positions"].to(positions)
    wanted = by_loops(given)
    with running_kernels():
        append_to_cache(**given)
    assert_same(given, wanted)


@pytest.mark.parametrize("Hkv", [1, 2])
def test_kernels_over_a_ring(Hkv):
    dtype = torch.float16
    pairs = ring_and_line(running_kernels, dtype, Hkv, window=6, step=2, capacity=18)
    for over_ring, over_line in pairs:
        torch.testing.assert_close(over_ring, over_line, atol=2e-3, rtol=2e-3)


def test_op_contract_of_the_kernel():
    given = inputs(2, dtype=torch.float32)
    with running_kernels():
        torch.library.opcheck(
            torch.ops.musiclm.append_to_cache.default, [*given.values(), None, None]
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(4, 3, 20)}, r"k has shape \(4, 3, 20\), wanted \(B Hkv N D\)"),
        ({"k": torch.zeros(4, 3, 2, 20).long()}, "k is torch.int64"),
        ({"v": torch.zeros(4, 3, 1, 20)}, "v has shape"),
        ({"v": torch.zeros(4, 3, 2, 20).half()}, "v is torch.float16"),
        ({"k_cache": torch.zeros(4, 3, 24)}, "k_cache has shape"),
        ({"k_cache": torch.zeros(4, 2, 24, 20)}, "k_cache has shape"),
        ({"k_cache": torch.zeros(4, 3, 24, 20).half()}, "k_cache is torch.float16"),
        ({"v_cache": torch.zeros(4, 3, 25, 20)}, "v_cache has shape"),
        ({"v_cache": torch.zeros(4, 3, 24, 20, device="meta")}, "v_cache is on meta"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions has shape"),
        ({"positions": torch.zeros(4)}, "positions is torch.float32"),
        ({"k_scales": torch.zeros(4, 3, 24)}, "k_scales is given without float8 caches"),
        (
            {"k": torch.zeros(4, 3, 25, 20), "v": torch.zeros(4, 3, 25, 20)},
            "k has 25 tokens, wanted at most the cache's 24 slots",
        ),
    ],
)
def test_refusals(change, message):
    given = {name: tensor.cpu() for name, tensor in inputs(2).items()}
    with pytest.raises(ValueError, match=message):
        append_to_cache(**given | change)


def test_float8_wants_scales_and_no_float64():
    given = inputs(2, cache=FLOAT8)
    with pytest.raises(ValueError, match=r"v_scales is None, wanted \(4, 3, 24\) float32"):
        append_to_cache(**given | {"v_scales": None})
    wide = {"k": given["k"].double(), "v": given["v"].double()}
    with pytest.raises(ValueError, match="k_cache is torch.float8_e4m3fn, wanted torch.float64"):
        append_to_cache(**given | wide)
