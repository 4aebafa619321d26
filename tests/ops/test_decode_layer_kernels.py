from contextlib import nullcontext

import pytest
import torch

from musiclm_kernels.decode_layer import decode_linear, decode_qkv, decode_residual
from musiclm_kernels.decode_layer import reference as definition
from musiclm_kernels.testing import through_kernels
from tests.ops.decode_layer_cases import linear_case, qkv_case, residual_case, results, rows

launch = pytest.importorskip("musiclm_kernels.decode_layer.launch")

GPU = torch.cuda.is_available()
DEFINITIONS = {
    decode_linear: definition.decode_linear,
    decode_qkv: definition.decode_qkv,
    decode_residual: definition.decode_residual,
}
NUM_ROWS = [1, 2, 4, 5, 16]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def running_kernels():
    """On a GPU the ops run their kernels as it is; without one, in Triton's interpreter."""
    return nullcontext() if GPU else through_kernels()


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several programs, and several tiles of a row, at the sizes that the interpreter can do."""
    if not GPU:
        monkeypatch.setattr(launch, "SLAB_PER_WARP", 32)
        monkeypatch.setattr(launch, "TILE_K", 32)
        monkeypatch.setattr(launch, "WIDE_TILE_K", 32)


def placed(case):
    """On the GPU, if there is one."""

    def place(value):
        if isinstance(value, tuple):
            return type(value)(*map(place, value))
        return value.cuda() if GPU and isinstance(value, torch.Tensor) else value

    arguments, keywords = case
    return tuple(map(place, arguments)), {name: place(value) for name, value in keywords.items()}


def as_float64(value):
    is_wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1
    return value.double() if is_wide else value


def check(function, case):
    """Against the definition in float64. Of the largest value at most an error of: fp32 sums; where
    several rows meet the tensor cores, x rounded to the product's type; and the result's rounding."""
    arguments, keywords = case = placed(case)
    with running_kernels():
        ours = results(function, arguments, keywords)
    options = {name: value for name, value in keywords.items() if name != "connection"}
    wide = {name: as_float64(value) for name, value in options.items()}
    if "connection" in keywords:
        connection = keywords["connection"]
        wide["connection"] = type(connection)(*map(as_float64, connection))
    for name in ("weight_scale", "k_scales", "v_scales"):
        if name in keywords:
            wide[name] = keywords[name]
    truth = results(DEFINITIONS[function], tuple(map(as_float64, arguments)), wide)
    weight = arguments[2 if function is decode_residual else 1]
    rounded = len(arguments[0]) > launch.MAX_SINGLE_ROWS or "q_gain" in keywords
    rounded = rounded or "k_scales" in keywords
    product = torch.finfo(launch.product_dtype(weight)).eps if rounded else 0.0
    for name, value in truth.items():
        assert ours[name].isfinite().all() if ours[name].itemsize > 1 else True, name
        if ours[name].dtype == torch.float8_e4m3fn:
            continue
        error = (ours[name].double() - value).abs().max().item()
        eps = max(torch.finfo(ours[name].dtype).eps, 2e-6) + product
        assert error <= eps * value.abs().max().item(), (name, error, value.abs().max())
    return ours, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", NUM_ROWS)
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_linear(B, dtype, activation):
    check(decode_linear, linear_case(B=B, D=64, N=38, dtype=dtype, activation=activation))


@pytest.mark.parametrize("B", [2, 5])
@pytest.mark.parametrize(
    "options", [{"norm": False}, {"activation": "gelu"}, {"streams": 4}, {"D": 50}]
)
def test_linear_options(B, options):
    check(decode_linear, linear_case(**{"B": B, "D": 64, "N": 13} | options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", NUM_ROWS)
def test_qkv(B, dtype):
    check(decode_qkv, qkv_case(B=B, D=64, dtype=dtype))


@pytest.mark.parametrize("B", NUM_ROWS)
@pytest.mark.parametrize("streams", [0, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_residual(B, streams, norm):
    check(decode_residual, residual_case(B=B, K=64, streams=streams, norm=norm))


@pytest.mark.parametrize("B", [3, 6])
@pytest.mark.parametrize(
    "options",
    [
        {"streams": 4, "normalize_kv": False, "averaged": True},
        {"normalize_kv": False, "H": 5, "Hkv": 1},
        {"normalize_kv": False, "gains": True, "norm": False},
        {"gains": True, "d": 12, "D": 50},
        {"d": 12, "D": 50},
        {"cache_dtype": torch.float16, "d": 6, "averaged": True},
    ],
)
def test_qkv_options(B, options):
    check(decode_qkv, qkv_case(**{"B": B, "D": 64} | options))


@pytest.mark.parametrize("B", [2, 5])
def test_qkv_into_float8_caches(B):
    ours, truth = check(
        decode_qkv, qkv_case(B=B, D=64, cache_dtype=torch.float8_e4m3fn, averaged=True)
    )
    for name in ("k", "v"):
        restored, wanted = (
            found[f"{name}_cache"].double() * found[f"{name}_scales"].double()[..., None]
            for found in (ours, truth)
        )
        # A step of three bits of mantissa: where both were within rounding of a tie. The interpreter
        # gives half of what rounding lifts to a power of two.
        near = (restored - wanted).abs() <= wanted.abs() / 7 + 1e-6
        lifted = (2 * restored - wanted).abs() <= 1e-6 * wanted.abs()
        assert (near | lifted if not GPU else near).all()
        assert (near & ((restored - wanted).abs() <= 1e-6 * wanted.abs())).double().mean() > 0.9


@pytest.mark.parametrize("B", [2, 5])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("options", [{"streams": 4}, {"streams": 1}, {"K": 45, "norm": True}])
def test_residual_options(B, mixed, options):
    case = {"B": B, "K": 64, "mixed": mixed, "h_dtype": torch.float16} | options
    check(decode_residual, residual_case(**case))


EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("case", ["linear", "qkv", "residual"])
def test_weights_of_8_bits(dtype, case):
    """Where several rows meet the tensor cores they are bfloat16, which the interpreter lacks."""
    options = {"B": 2, "dtype": dtype}
    if case == "linear":
        check(decode_linear, linear_case(D=64, activation="geglu", **options))
    elif case == "qkv":
        check(decode_qkv, qkv_case(D=64, **options))
    else:
        check(decode_residual, residual_case(K=50, norm=True, **options))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("case", ["linear", "qkv", "residual"])
def test_weights_of_8_bits_at_once(dtype, case, monkeypatch):
    """As float16, which holds all of their values too."""
    monkeypatch.setattr(launch, "PRODUCT_OF_8_BITS", torch.float16)
    options = {"B": 5, "dtype": dtype}
    if case == "linear":
        check(decode_linear, linear_case(D=64, activation="geglu", **options))
    elif case == "qkv":
        check(decode_qkv, qkv_case(D=64, gains=True, **options))
    else:
        check(decode_residual, residual_case(K=50, norm=True, **options))


CASES = {
    "linear": (decode_linear, linear_case(B=16, D=64, activation="geglu")),
    "linear of streams": (decode_linear, linear_case(B=16, D=64, streams=4)),
    "qkv": (decode_qkv, qkv_case(B=16, D=64, averaged=True)),
    "qkv of unit heads": (decode_qkv, qkv_case(B=16, D=64, gains=True)),
    "qkv without a norm of keys": (decode_qkv, qkv_case(B=16, D=64, normalize_kv=False)),
    "residual": (decode_residual, residual_case(B=16, K=64, norm=True)),
    "residual of streams": (decode_residual, residual_case(B=16, K=64, streams=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_depend_on_others(case):
    """The same bits alone and beside three others; and beside four and fifteen.

    Of the latter the first rows are compared: the interpreter multiplies by BLAS, whose bits depend
    on where in a tile a row lies. A GPU's do not, and the last rows are compared there.
    """
    function, case = CASES[case]
    arguments, keywords = placed(case)
    last_of_16 = slice(11, 16) if GPU else slice(0, 5)
    for together, alone in ((slice(11, 15), slice(14, 15)), (slice(0, 16), last_of_16)):
        with running_kernels():
            many = results(function, *rows(arguments, keywords, together))
            few = results(function, *rows(arguments, keywords, alone))
        where = slice(alone.start - together.start, alone.stop - together.start)
        for name, value in few.items():
            assert torch.equal(value, many[name][where]), name


@pytest.mark.parametrize("K", [64, 90])  # whole tiles, and a last one that is not full
@pytest.mark.parametrize("first", [0.0, 20.0])
def test_norm_of_rows_far_from_zero_and_from_their_first_tile(K, first):
    """300 deviations from zero, where a mean is right to 2e-5 of a deviation and a difference of
    float32 squares to 5e-3 of a variance."""
    (x, h, weight), keywords = residual_case(B=6, K=K, norm=True)
    h[:, :32] += first
    h = (h + 300) * torch.logspace(-2, 3, 6)[:, None]
    h[5] = 7.0  # all alike: the norm's bias is left
    arguments, keywords = placed(((x, h, weight), keywords))
    with running_kernels():
        ours = results(decode_residual, arguments, keywords)["x"]
    wide = {name: value.double() for name, value in keywords.items()}
    truth = results(definition.decode_residual, tuple(map(torch.Tensor.double, arguments)), wide)[
        "x"
    ]
    assert (ours - truth).abs().max() <= 1e-4 * truth.abs().max()


CALLS = {
    "linear": (decode_linear, linear_case, {"D": 64, "activation": "geglu"}),
    "qkv": (decode_qkv, qkv_case, {"D": 64}),
    "qkv without a norm of keys": (decode_qkv, qkv_case, {"D": 64, "normalize_kv": False}),
    "qkv of unit heads": (decode_qkv, qkv_case, {"D": 64, "gains": True}),
    "residual": (decode_residual, residual_case, {"K": 64}),
    "residual with a norm": (decode_residual, residual_case, {"K": 64, "norm": True}),
    "residual of streams": (decode_residual, residual_case, {"K": 64, "streams": 4}),
    "linear of streams": (decode_linear, linear_case, {"D": 64, "streams": 4}),
    "qkv of streams": (decode_qkv, qkv_case, {"D": 64, "streams": 4, "normalize_kv": False}),
}


class Noted:
    """In a kernel's place: notes its launches, and computes nothing."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launched.append(self.name)


@pytest.mark.parametrize("B", [1, 4, 5, 16])
@pytest.mark.parametrize("call", CALLS)
def test_number_of_launches(call, B, monkeypatch):
    """One, but for streams that the tensor cores take: those are read by a launch of its own."""
    function, make, options = CALLS[call]
    launched = []
    for name in ("linear_kernel", "qkv_kernel", "residual_kernel", "prepare_kernel"):
        monkeypatch.setattr(launch, name, Noted(name, launched))
    arguments, keywords = placed(make(B=B, **options))
    with running_kernels():
        results(function, arguments, keywords)
    reads_streams = "streams" in options and function is not decode_residual
    before = ["prepare_kernel"] if reads_streams and B > launch.MAX_SINGLE_ROWS else []
    own = {decode_linear: "linear", decode_qkv: "qkv", decode_residual: "residual"}[function]
    assert launched == [*before, f"{own}_kernel"]


def test_streams_that_no_registers_hold(monkeypatch):
    monkeypatch.setattr(launch, "MAX_STREAM_ELEMENTS", 255)
    check(decode_linear, linear_case(B=2, D=64, streams=4))
    check(decode_qkv, qkv_case(B=2, D=64, streams=4, normalize_kv=False))


def test_strided_caches_weights_and_positions():
    arguments, keywords = placed(qkv_case(B=2, D=64))
    x, weight, k_cache, v_cache, positions = arguments
    padded = x.new_full((len(weight), 72), torch.nan)
    padded[:, :64] = weight
    layers = x.new_zeros(3, 2, 2, 5, 2, 8)  # [layer, k or v, B, S, Hkv, d]
    k_view, v_view = (part.transpose(1, 2) for part in layers[1])
    k_view.copy_(k_cache), v_view.copy_(v_cache)
    spread = positions.repeat_interleave(2)[::2]
    with running_kernels():
        decode_qkv(x, padded[:, :64], k_view, v_view, spread, **keywords)
        decode_qkv(x, weight, k_cache, v_cache, positions, **keywords)
    assert torch.equal(k_view, k_cache) and torch.equal(v_view, v_cache)
    assert not layers[0].any() and not layers[2].any()


def test_more_rows_than_a_tile_run_the_plain_body(monkeypatch):
    for function, case in (
        (decode_linear, linear_case(B=17, D=64)),
        (decode_qkv, qkv_case(B=17, D=64)),
        (decode_residual, residual_case(B=17, K=64)),
    ):
        with monkeypatch.context() as patched:
            for name in ("linear", "qkv", "residual", "prepare"):
                patched.setattr(launch, f"{name}_kernel", None)
            check(function, case)


def test_no_rows():
    for function, case in (
        (decode_linear, linear_case(B=0)),
        (decode_qkv, qkv_case(B=0)),
        (decode_residual, residual_case(B=0)),
    ):
        with running_kernels():
            for value in results(function, *placed(case)).values():
                assert len(value) == 0
