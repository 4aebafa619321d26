import pytest
import torch

from musiclm_kernels.decode_layer import (
    HyperConnection,
    decode_linear,
    decode_qkv,
    decode_residual,
    quantize_weight,
)
from musiclm_kernels.decode_layer import reference as definition
from tests.ops.decode_layer_cases import (
    EIGHT_BITS,
    Draw,
    cloned,
    linear_case,
    qkv_case,
    residual_case,
    results,
    rows,
)

F64 = {"dtype": torch.float64, "x_dtype": torch.float64}
LINEAR = [decode_linear, definition.decode_linear]
QKV = [decode_qkv, definition.decode_qkv]
RESIDUAL = [decode_residual, definition.decode_residual]


def normed(x, norm_weight=None, norm_bias=None):
    if norm_weight is None:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight + norm_bias
    )


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def parted(keywords):
    """The keywords of a norm, and the others."""
    norm = {name: keywords[name] for name in ("norm_weight", "norm_bias") if name in keywords}
    return norm, {name: value for name, value in keywords.items() if name not in norm}


@pytest.mark.parametrize("function", LINEAR)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu", "geglu"])
def test_linear_matches_a_formula(function, norm, activation):
    (x, weight), keywords = linear_case(norm=norm, activation=activation, **F64)
    y, mix = function(x, weight, **keywords)
    product = torch.einsum("bk,nk->bn", normed(x, **parted(keywords)[0]), weight)
    wanted = {
        "none": product,
        "gelu": gelu(product),
        "geglu": product[:, :10] * gelu(product[:, 10:]),
    }[activation]
    torch.testing.assert_close(y, wanted)
    assert mix is None


def unpacked(connection, norm_gamma):
    """hyper-connections' own parameters, of which `connection` is the packed form."""
    weight, scale, static = connection
    D = weight.shape[1]
    factor = D**0.5 * (norm_gamma + 1)
    return {
        "static_alpha": static[:, :-1],
        "static_beta": static[:, -1],
        "dynamic_alpha_fn": (weight[:-1] / factor).T,
        "dynamic_beta_fn": weight[-1] / factor,
        "dynamic_alpha_scale": scale[:-1],
        "dynamic_beta_scale": scale[-1],
    }


def hyper_connected(streams, branch, connection, mixed):
    """Formulas of the package hyper-connections, by loops over streams."""
    D = streams.shape[-1]
    gamma = 0.1 * torch.arange(D, dtype=streams.dtype)
    p = unpacked(connection, gamma)
    unit = streams / streams.norm(dim=-1, keepdim=True) * D**0.5 * (gamma + 1)
    alpha = torch.tanh(unit @ p["dynamic_alpha_fn"]) * p["dynamic_alpha_scale"] + p["static_alpha"]
    beta = torch.tanh(unit @ p["dynamic_beta_fn"]) * p["dynamic_beta_scale"] + p["static_beta"]
    read = torch.einsum("bst,bsd->btd", alpha, streams)
    out = branch(read[:, 0])
    kept = read[:, 1:] if mixed else streams
    return kept + beta[:, :, None] * out[:, None]


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("s", [1, 2, 4])
def test_a_sub_layer_between_hyper_connections(mixed, s):
    (x, up), keywords = linear_case(streams=s, activation="gelu", **F64)
    down = Draw(3)(24, 20, dtype=torch.float64)
    norm, _ = parted(keywords)
    wanted = hyper_connected(
        x, lambda read: gelu(normed(read, **norm) @ up.T) @ down.T, keywords["connection"], mixed
    )
    for linear, residual in zip(LINEAR, RESIDUAL, strict=True):
        streams = x.clone()
        h, mix = linear(streams, up, **keywords)
        residual(streams, h, down, mix=mix, mixed=mixed)
        torch.testing.assert_close(streams, wanted)


@pytest.mark.parametrize("function", QKV)
@pytest.mark.parametrize("normalize_kv", [True, False])
@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("averaged", [True, False])
def test_qkv_matches_a_formula(function, normalize_kv, gains, averaged):
    case = qkv_case(normalize_kv=normalize_kv, gains=gains, averaged=averaged, **F64)
    (x, weight, k_cache, v_cache, _), keywords = case
    found = results(function, *case)
    norm, rest = parted(keywords)
    read = normed(x, **norm)
    q, k, v = weight.view(8, 8, 24).split([4, 2, 2])
    q = torch.einsum("hdk,bk->bhd", q, read)
    k, v = (torch.einsum("hdk,bk->bhd", part, read if normalize_kv else x) for part in (k, v))
    if gains:
        q = q / q.square().sum(-1, keepdim=True).sqrt() * rest["q_gain"]
        k = k / k.square().sum(-1, keepdim=True).sqrt() * rest["k_gain"]
    cached = (v + rest["first_value"]) / 2 if averaged else v
    for b, slot in ((0, 2), (2, 2)):  # 7 % 5; row 1 writes nothing
        k_cache[b, :, slot], v_cache[b, :, slot] = k[b], cached[b]
    wanted = {"q": q, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("function", QKV)
def test_float8_caches(function):
    case = qkv_case(cache_dtype=torch.float8_e4m3fn, x_dtype=torch.float32)
    case[0][1][32 + 3 : 32 + 4] *= 40  # an outlier channel of the keys
    case[0][1][48:56] = 0  # the values of a head
    found = results(function, *case)
    (*_, k_cache, v_cache, _positions), keywords = case
    wide = qkv_case()
    wide[0][1].copy_(case[0][1])
    exact = results(function, *wide)
    for name in ("k", "v"):
        cache, scales = found[f"{name}_cache"].float(), found[f"{name}_scales"]
        truth = exact[f"{name}_cache"][[0, 2], :, 2]
        scale = truth.abs().amax(-1) / 448
        torch.testing.assert_close(scales[[0, 2], :, 2], torch.where(scale > 0, scale, 1.0))
        restored = cache[[0, 2], :, 2] * scales[[0, 2], :, 2, None]
        # Half a step of three bits of mantissa, or of the smallest that there is.
        assert ((restored - truth).abs() <= truth.abs() / 15 + scale[..., None] / 512).all()
        before = {"k": k_cache, "v": v_cache}[name]
        assert torch.equal(found[f"{name}_cache"][1].float(), before[1].float())
        assert torch.equal(scales[1], keywords[f"{name}_scales"][1])


@pytest.mark.parametrize("function", RESIDUAL)
@pytest.mark.parametrize("norm", [True, False])
def test_residual_matches_a_formula(function, norm):
    case = residual_case(norm=norm, **F64)
    (x, h, weight), keywords = case
    wanted = x + torch.einsum("bk,nk->bn", normed(h, **keywords), weight)
    torch.testing.assert_close(results(function, *case)["x"], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_dtype(dtype):
    case = linear_case(dtype=dtype)
    assert decode_linear(*case[0], **case[1])[0].dtype == dtype
    assert decode_linear(*case[0], **case[1], dtype=torch.float32)[0].dtype == torch.float32
    case = linear_case(dtype=torch.int8)
    assert decode_linear(*case[0], **case[1])[0].dtype == torch.float32
    q, v, _ = decode_qkv(*qkv_case(dtype=dtype)[0])
    assert q.dtype == v.dtype == dtype


# What a quick product may be off by, of the largest result: x and the product are rounded to bfloat16,
# half of its epsilon each, and twice where a value meets a gate.
ROUNDED = 2 * torch.finfo(torch.bfloat16).eps
QUICK = {
    torch.float32: 1e-5,
    torch.float16: 1e-5,
    torch.bfloat16: ROUNDED,
    torch.int8: ROUNDED,
    torch.float8_e4m3fn: ROUNDED,
}


@pytest.mark.parametrize("dtype", QUICK)
@pytest.mark.parametrize("K", [64, 50])  # 50: nothing that aten's int8 product takes
def test_quick_body(dtype, K):
    options = {"D": K, "dtype": dtype}
    for function, exactly, case in (
        (decode_linear, definition.decode_linear, linear_case(activation="geglu", **options)),
        (decode_qkv, definition.decode_qkv, qkv_case(**options)),
        (decode_residual, definition.decode_residual, residual_case(K=K, D=24, dtype=dtype)),
    ):
        if len(case[0]) != 3:
            case[1]["dtype"] = torch.float32
        ours, truth = results(function, *case), results(exactly, *case)
        for name in truth:
            error = (ours[name] - truth[name]).abs().max()
            assert error <= QUICK[dtype] * truth[name].abs().max(), name


def test_quick_body_of_int8_rows_with_gaps_after_them():
    (x, weight), keywords = linear_case(D=50, dtype=torch.int8)
    padded = torch.full((20, 64), 77, dtype=torch.int8)
    padded[:, :50] = weight
    truth, _ = definition.decode_linear(x, weight, **keywords)
    y, _ = decode_linear(x, padded[:, :50], **keywords)
    assert (y - truth).abs().max() <= ROUNDED * truth.abs().max()


def test_inductor_takes_the_int8_body():
    (x, weight), keywords = linear_case(D=64, N=16, dtype=torch.int8)
    compiled = torch.compile(lambda x: decode_linear(x, weight, **keywords)[0], fullgraph=True)
    wanted, _ = decode_linear(x, weight, **keywords)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype, share", [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 1 / 16)])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
def test_quantized_weights(dtype, share, source):
    weight = Draw()(7, 33, dtype=source)
    weight[2] = 0
    weight[3, 5] = 100
    quantized, scale = quantize_weight(weight, dtype)
    assert quantized.dtype == dtype and scale.dtype == torch.float32
    assert scale[2] == 1 and not quantized[2].float().any()
    peaks = weight.double().abs().amax(1)
    largest = 127 if dtype == torch.int8 else 448
    assert (quantized.double().abs().amax(1)[scale != 1] == largest).all()
    restored = quantized.double() * scale[:, None]
    error = (restored - weight.double()).abs()
    bound = (
        peaks[:, None] if dtype == torch.int8 else weight.double().abs() + peaks[:, None] / 28000
    )
    assert (error <= share * bound * (1 + 1e-6)).all()


CASES = {
    "linear": (decode_linear, linear_case(activation="geglu")),
    "linear of streams": (decode_linear, linear_case(streams=4, activation="gelu")),
    "linear int8": (decode_linear, linear_case(dtype=torch.int8, D=32)),
    "qkv": (decode_qkv, qkv_case(gains=True, averaged=True)),
    "qkv of streams": (decode_qkv, qkv_case(streams=2, normalize_kv=False)),
    "qkv float8 caches": (decode_qkv, qkv_case(cache_dtype=torch.float8_e4m3fn)),
    "residual": (decode_residual, residual_case(norm=True)),
    "residual of streams": (decode_residual, residual_case(streams=4, h_dtype=torch.bfloat16)),
    "residual of kept streams": (decode_residual, residual_case(streams=4, mixed=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_depend_on_others(case):
    function, (arguments, keywords) = CASES[case]
    together = results(function, arguments, keywords)
    for b in range(3):
        alone = results(function, *rows(arguments, keywords, slice(b, b + 1)))
        for name, value in alone.items():
            torch.testing.assert_close(value.float(), together[name][b : b + 1].float(), msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("inlined", [True, False])
def test_compiles_without_graph_break(case, inlined, monkeypatch):
    function, (arguments, keywords) = CASES[case]
    if not inlined:  # as on a GPU: the op itself is in the graph
        monkeypatch.setattr("musiclm_kernels.decode_layer.op.inlines_on_cpu", lambda x: False)
    torch.compiler.reset()
    ours = results(
        torch.compile(function, fullgraph=True, backend="aot_eager"), arguments, keywords
    )
    for name, value in results(function, arguments, keywords).items():
        if inlined:  # what the compiler sees may add up in another order
            torch.testing.assert_close(ours[name].float(), value.float(), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours[name].float(), value.float()), name


def op_arguments(function, arguments, keywords):
    """As the public function calls its op."""
    connection = keywords.get("connection") or (None, None, None)
    if function is decode_residual:
        names = ("weight_scale", "norm_weight", "norm_bias", "mix")
        return (*arguments, *map(keywords.get, names), keywords.get("mixed", True))
    norm = [keywords.get(name) for name in ("weight_scale", "norm_weight", "norm_bias")]
    if function is decode_linear:
        activation = keywords.get("activation", "none")
        return (*arguments, *norm, activation, *connection, torch.float32)
    own = [keywords.get(name) for name in ("q_gain", "k_gain", "first_value")]
    scales = [keywords.get(name) for name in ("k_scales", "v_scales")]
    normalize_kv = keywords.get("normalize_kv", True)
    return (*arguments, *norm, normalize_kv, *own, *connection, *scales, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_op_contracts(case):
    function, (arguments, keywords) = CASES[case]
    op = getattr(torch.ops.musiclm, function.__name__).default
    # PyTorch cannot compare float8 caches before and after, which its test of the schema does.
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    tests += [] if "float8" in case else ["test_schema"]
    torch.library.opcheck(
        op, op_arguments(function, *cloned(arguments, keywords)), test_utils=tests
    )


def test_no_rows():
    for function, case in (
        (decode_linear, linear_case(B=0)),
        (decode_residual, residual_case(B=0)),
    ):
        for value in results(function, *case).values():
            assert len(value) == 0


W8 = torch.zeros(20, 24, dtype=torch.int8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 24, 1)}, r"x has shape \(3, 24, 1\), wanted \(B, D\) without a conn"),
        ({"x": torch.zeros(3, 24).half()}, "x is torch.float16"),
        ({"weight": torch.zeros(20, 23)}, r"weight has shape \(20, 23\), wanted \(20, 24\)"),
        ({"weight": torch.zeros(20, 24).double()}, "weight is torch.float64"),
        ({"weight": torch.zeros(24, 20).T}, "weight has strides"),
        ({"weight": W8}, "weight_scale is None beside torch.int8"),
        ({"weight_scale": torch.ones(20)}, "weight_scale is given beside torch.float32"),
        ({"weight": W8, "weight_scale": torch.ones(24)}, "weight_scale has shape"),
        ({"weight": W8, "weight_scale": torch.ones(20).half()}, "weight_scale is torch.float16"),
        ({"norm_weight": torch.ones(20)}, "norm_weight has shape"),
        ({"norm_weight": torch.ones(48)[::2]}, r"norm_weight has strides \(2,\)"),
        ({"norm_weight": None}, "norm_bias is given without norm_weight"),
        ({"norm_bias": torch.ones(24).long()}, "norm_bias is torch.int64"),
        ({"activation": "relu"}, "activation is 'relu', wanted one of none, gelu, geglu"),
        ({"weight": torch.zeros(21, 24), "activation": "geglu"}, "weight has 21 rows"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"connection": Draw().connection(2, 24)}, "wanted .B, s, D. with a connection"),
        ({"x": torch.zeros(3, 4, 24), "connection": Draw().connection(2, 24)}, "connection.weight"),
        ({"weight": torch.zeros(20, 24, device="meta")}, "weight is on meta"),
    ],
)
def test_refusals_of_linear(change, message):
    (x, weight), keywords = linear_case()
    with pytest.raises(ValueError, match=message):
        decode_linear(**{"x": x, "weight": weight} | keywords | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_cache": torch.zeros(3, 2, 8)}, "k_cache has shape"),
        ({"v_cache": torch.zeros(3, 2, 6, 8)}, "v_cache has shape"),
        ({"v_cache": torch.zeros(3, 2, 5, 8).half()}, "k_cache is torch.float32, wanted"),
        ({"k_cache": torch.zeros(3, 2, 5, 8).int()}, "k_cache is torch.int32"),
        ({"weight": torch.zeros(60, 24)}, r"weight has 60 rows, wanted \(H \+ 4\) \* 8"),
        ({"weight": torch.zeros(32, 24)}, "weight has 32 rows"),
        ({"positions": torch.zeros(4).long()}, "positions has shape"),
        ({"positions": torch.zeros(3)}, "positions is torch.float32"),
        ({"q_gain": torch.zeros(2, 8)}, r"q_gain has shape \(2, 8\), wanted \(8,\) or \(4, 8\)"),
        ({"k_gain": torch.zeros(9)}, "k_gain has shape"),
        ({"first_value": torch.zeros(3, 4, 8)}, "first_value has shape"),
        ({"k_scales": torch.zeros(3, 2, 5)}, "k_scales is given beside caches of torch.float32"),
    ],
)
def test_refusals_of_qkv(change, message):
    (x, weight, k_cache, v_cache, positions), keywords = qkv_case()
    named = {"x": x, "weight": weight, "k_cache": k_cache, "v_cache": v_cache}
    with pytest.raises(ValueError, match=message):
        decode_qkv(**named | {"positions": positions} | keywords | change)


def test_float8_caches_want_scales():
    arguments, keywords = qkv_case(cache_dtype=torch.float8_e4m3fn)
    del keywords["v_scales"]
    with pytest.raises(ValueError, match="v_scales is None beside caches of torch.float8_e4m3fn"):
        decode_qkv(*arguments, **keywords)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(24, 3).T}, "x has strides"),
        ({"h": torch.zeros(2, 20)}, "h has shape"),
        ({"h": torch.zeros(3, 20).double()}, "h is torch.float64"),
        ({"weight": torch.zeros(20, 20)}, r"weight has shape \(20, 20\), wanted \(24, 20\)"),
        ({"norm_weight": torch.zeros(24)}, "norm_weight has shape"),
        ({"mix": torch.zeros(3, 4, 6)}, "wanted .B, s, D. with a mix"),
        ({"x": torch.zeros(3, 4, 24), "mix": torch.zeros(3, 4, 5)}, "mix has shape"),
        ({"x": torch.zeros(3, 4, 24), "mix": torch.zeros(3, 4, 6).half()}, "mix is torch.float16"),
    ],
)
def test_refusals_of_residual(change, message):
    (x, h, weight), keywords = residual_case()
    with pytest.raises(ValueError, match=message):
        decode_residual(**{"x": x, "h": h, "weight": weight} | keywords | change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32])
def test_quantize_refuses_other_types(dtype):
    with pytest.raises(ValueError, match="dtype is"):
        quantize_weight(torch.zeros(2, 3), dtype)
    with pytest.raises(ValueError, match="weight has shape"):
        quantize_weight(torch.zeros(3), torch.int8)


def test_a_connection_is_three_tensors():
    assert HyperConnection._fields == ("weight", "scale", "static")
    assert EIGHT_BITS == (torch.int8, torch.float8_e4m3fn)
