"""The last launch of a decode step: its body, and its kernel in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

from musiclm_kernels import implementations, reference, sample_logits, sample_next_token
from musiclm_kernels.testing import through_kernels

GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(GPU, reason="runs compiled there instead")
FILTERS = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
WEIGHTS = [torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.fixture
def poisoned(monkeypatch):
    """Everything a kernel allocates starts as NaN, or as a token that there is not."""
    empty = torch.empty

    def poison(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(123456789)

    monkeypatch.setattr(torch, "empty", poison)


def problem(B=3, D=40, L=3, V=37, *, guided=True, streams=None, dtype=torch.float32, **options):
    """The arguments by name. Row 1 is finished; token 3 ends a row."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    R = 2 * B if guided else B
    weight, scale = draw(L, V, D) / 4, None
    if dtype.itemsize == 1:
        scale = weight.abs().amax(-1) / (127 if dtype == torch.int8 else 448)
        weight = weight / scale[..., None]
        weight = weight.round() if dtype == torch.int8 else weight
    arguments = {
        "x": draw(R, D) if streams is None else draw(R, streams, D),
        "norm_weight": 1 + 0.3 * draw(D),
        "norm_bias": draw(D),
        "head_weight": weight.to(dtype),
        "embedding": draw(L, V + 2, D),
        "head_scale": scale,
        "head_bias": draw(L, V),
        "step": torch.tensor(7),
        "seeds": torch.arange(5, 5 + B),
        **FILTERS,
        "guidance_scale": 2.0 if guided else None,
        "allowed": torch.rand(L, V, generator=generator) > 0.2,
        "eos": 3,
        "eos_from": 0,
        "finished": torch.arange(B) == 1,
        "counters": torch.zeros(1, dtype=torch.int32),
    }
    arguments["head_bias"][:, 3] += options.pop("pull", 0.0)
    return arguments | options


def copy(arguments):
    return {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}


def rows_of(arguments, rows):
    """The same problem with these rows, and their twins, alone."""
    B = len(arguments["seeds"])
    ours = copy(arguments)
    ours["x"] = arguments["x"].unflatten(0, (-1, B))[:, rows].flatten(0, 1).clone()
    for name in ("seeds", "finished"):
        if arguments[name] is not None:
            ours[name] = arguments[name][rows].clone()
    return ours


def in_float64(arguments):
    return {
        n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in copy(arguments).items()
    }


def by_hand(x, norm_weight, norm_bias, head_weight, embedding, *, head_scale, head_bias, step,
            seeds, guidance_scale, allowed, eos, eos_from, finished, counters, **filters):  # fmt: skip
    """Row by row, with a copy of everything at the step's level, in float64."""
    B, level = len(seeds), int(step) % len(head_weight)
    tokens, following = [], torch.empty_like(x)
    for b in range(B):
        logits = []
        for row in [b] if guidance_scale is None else [b, B + b]:
            h = x[row] if x.dim() == 2 else x[row].sum(0)
            h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() * norm_weight
            h = h if norm_bias is None else h + norm_bias
            out = head_weight[level].to(h.dtype) @ h
            out = out if head_scale is None else out * head_scale[level]
            logits.append(out if head_bias is None else out + head_bias[level])
        may_be_drawn = torch.ones(len(logits[0]), dtype=torch.bool)
        if allowed is not None:
            may_be_drawn &= allowed[level]
        if eos is not None and int(step) < eos_from:
            may_be_drawn[eos] = False
        token = int(
            sample_logits(
                logits[0][None],
                unconditional=logits[1][None] if len(logits) > 1 else None,
                guidance_scale=guidance_scale,
                allowed=may_be_drawn,
                seeds=seeds[b : b + 1],
                step=int(step),
                **filters,
            )
        )
        if finished is not None and finished[b]:
            token = eos
        tokens.append(token)
        for row in [b] if guidance_scale is None else [b, B + b]:
            following[row] = embedding[level, token]
    tokens = torch.tensor(tokens)
    return tokens, following, None if finished is None else finished | (tokens == eos)


CASES = {
    "guided": {},
    "one row": {"guided": False, "B": 1},
    "streams": {"streams": 4, "B": 5},
    "one level": {"L": 1, "B": 2},
    "seventeen rows": {"B": 17, "guided": False},
    "greedy": {"temperature": 0.0},
    "unfiltered": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "no end yet": {"eos_from": 8, "allowed": None, "pull": 99.0},
    "an end": {"eos_from": 7, "allowed": None, "pull": 99.0},
    "bare": {
        "norm_bias": None, "head_bias": None, "allowed": None, "eos": None, "finished": None,
        "counters": None, "D": 130, "V": 129,
    },
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_the_end_is_drawn_from_its_step_on():
    assert sample_next_token(**problem(**CASES["no end yet"], finished=None)).ne(3).all()
    assert sample_next_token(**problem(**CASES["an end"], finished=None)).eq(3).all()


@cases
@pytest.mark.parametrize("function", [sample_next_token, reference.sample_next_token])
@pytest.mark.parametrize("step", [7, 2**33 + 2])
def test_matches_the_formulas(function, case, step):
    arguments = problem(**case, step=torch.tensor(step))
    wanted = by_hand(**in_float64(arguments))
    tokens = function(**arguments)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, wanted[0])
    assert torch.equal(arguments["x"], wanted[1].float())
    if wanted[2] is not None:
        assert torch.equal(arguments["finished"], wanted[2])
        assert tokens[arguments["finished"]].eq(3).all()


def test_the_reference_takes_float64():
    exact = in_float64(problem())
    wanted = by_hand(**copy(exact))
    tokens = reference.sample_next_token(**exact)
    assert torch.equal(tokens, wanted[0]) and torch.equal(exact["x"], wanted[1])


@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.bfloat16])
def test_every_type_of_weight(dtype):
    arguments = problem(dtype=dtype, D=64, B=8)
    wanted = by_hand(**in_float64(arguments))
    assert torch.equal(reference.sample_next_token(**arguments), wanted[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_quick_products_err_as_bfloat16_does(dtype):
    from musiclm_kernels.sampling.next_token_op import _quick_product

    arguments = problem(dtype=dtype, D=64)
    weight, scale = arguments["head_weight"][0], arguments["head_scale"]
    scale = None if scale is None else scale[0]
    x = arguments["x"]
    exact = x.double() @ weight.double().T
    most = x.double().abs() @ weight.double().abs().T
    if scale is not None:
        exact, most = exact * scale, most * scale
    ours = _quick_product(x, weight, scale)
    assert ours.dtype == torch.float32
    assert ((ours - exact).abs() < 2**-8 * most).all()
    assert not torch.equal(ours, F.linear(x, weight.float()) * (1 if scale is None else scale))


def test_finished_rows_stay_finished_and_others_go_on():
    arguments = problem(B=40, guided=False, L=1, allowed=None, temperature=3.0, top_k=0, top_p=1.0)
    was = arguments["finished"]
    for step in range(12):
        before = was.clone()
        tokens = sample_next_token(**arguments | {"step": torch.tensor(step), "eos_from": 4})
        assert tokens[before].eq(3).all()
        assert torch.equal(was, before | (tokens == 3))
        assert step >= 4 or torch.equal(was, before)
    assert 1 < was.sum() < 40


def test_a_row_does_not_depend_on_the_others():
    arguments = problem(B=6, head_weight=torch.randint(-3, 4, (3, 37, 40)).float())
    together = sample_next_token(**copy(arguments))
    for b in range(6):
        assert sample_next_token(**rows_of(arguments, slice(b, b + 1))) == together[b]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("case", [{}, {"streams": 2, "guided": False}, CASES["greedy"]], ids=str)
def test_compiles_without_graph_break(case, dtype):
    arguments, ours = (problem(**case, D=64, dtype=dtype) for _ in range(2))
    wanted = sample_next_token(**arguments)
    torch.compiler.reset()
    compiled = torch.compile(sample_next_token, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**ours), wanted)
    assert torch.equal(ours["x"], arguments["x"])
    assert torch.equal(ours["finished"], arguments["finished"])


def test_the_compiler_finds_the_same_tokens():
    # Whole numbers: then no sum over D is rounded, in whatever order it is taken.
    generator = torch.Generator().manual_seed(1)
    head = torch.randint(-3, 4, (3, 37, 40), generator=generator).float()
    x = torch.randint(0, 2, (128, 20), generator=generator).float()
    options = {"B": 64, "head_weight": head, "x": torch.cat([x, 1 - x], 1)}
    options |= {"norm_weight": torch.full((40,), (0.25 + 1e-5) ** 0.5), "norm_bias": None}
    torch.compiler.reset()
    compiled = torch.compile(sample_next_token, fullgraph=True)
    arguments, ours = (problem(**copy(options)) for _ in range(2))
    for step in (1, 2, 5):
        state = {"x": options["x"].clone(), "step": torch.tensor(step)}
        wanted = sample_next_token(**arguments | copy(state))
        assert torch.equal(compiled(**ours | copy(state)), wanted)
        assert torch.equal(ours["finished"], arguments["finished"])


def op_arguments(arguments):
    order = (
        "x norm_weight norm_bias head_weight embedding head_scale head_bias step seeds temperature "
        "top_k top_p min_p guidance_scale allowed eos eos_from finished counters"
    )
    return tuple(arguments[name] for name in order.split())


@pytest.mark.parametrize("case", ["guided", "bare"])
def test_the_op_contract(case):
    op = torch.ops.musiclm.sample_next_token.default
    torch.library.opcheck(op, op_arguments(problem(**CASES[case])))


@pytest.mark.parametrize(
    "change, name",
    [
        ({"head_weight": torch.zeros(37, 40)}, "head_weight has shape"),
        ({"head_weight": torch.zeros(3, 0, 40)}, "head_weight has shape"),
        ({"head_weight": torch.zeros(3, 37, 40).double()}, "head_weight is torch.float64"),
        ({"head_weight": torch.zeros(3, 37, 40).to(torch.int8)}, "head_scale is None"),
        ({"head_scale": torch.zeros(3, 37)}, "wanted None beside torch.float32"),
        ({"seeds": torch.zeros(3, 1, dtype=torch.int64)}, "seeds has shape"),
        ({"seeds": torch.zeros(3)}, "seeds is torch.float32"),
        ({"x": torch.zeros(3, 40)}, "x has shape"),
        ({"x": torch.zeros(6, 41)}, "x has shape"),
        ({"x": torch.zeros(6, 40).half()}, "x is torch.float16"),
        ({"x": torch.zeros(40, 6).T}, "x has strides"),
        ({"guidance_scale": None}, "x has shape"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"embedding": torch.zeros(3, 36, 40)}, "embedding has shape"),
        ({"embedding": torch.zeros(3, 37, 40).double()}, "embedding is torch.float64"),
        ({"norm_weight": torch.zeros(41)}, "norm_weight has shape"),
        ({"norm_bias": torch.zeros(40).double()}, "norm_bias is torch.float64"),
        ({"head_bias": torch.zeros(37)}, "head_bias has shape"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, "step has shape"),
        ({"step": torch.tensor(1.0)}, "step is torch.float32"),
        ({"allowed": torch.ones(37, dtype=torch.bool)}, "allowed has shape"),
        ({"allowed": torch.ones(3, 37)}, "allowed is torch.float32"),
        ({"eos": None}, "eos is None"),
        ({"eos": 37}, "eos is 37"),
        ({"finished": torch.ones(2, dtype=torch.bool)}, "finished has shape"),
        ({"counters": torch.zeros(1, dtype=torch.int64)}, "counters is torch.int64"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_refusals(change, name):
    with pytest.raises(ValueError, match=name):
        sample_next_token(**problem() | change)


@pytest.mark.parametrize(
    "name", ["norm_weight", "norm_bias", "head_weight", "embedding", "head_bias", "finished"]
)
def test_refuses_what_is_not_packed(name):
    arguments = problem()
    arguments[name] = arguments[name].repeat_interleave(2, dim=-1)[..., ::2]
    with pytest.raises(ValueError, match=f"{name} has strides .*, wanted a packed tensor"):
        sample_next_token(**arguments)


@pytest.mark.parametrize("compiled", [False, True])
def test_leaves_no_gradient(compiled):
    arguments = problem()
    for name in ("norm_weight", "head_weight", "embedding"):
        arguments[name].requires_grad_()
    run = sample_next_token
    if compiled:
        run = torch.compile(sample_next_token, fullgraph=True, backend="aot_eager")
    run(**arguments)
    assert not arguments["x"].requires_grad


def test_compiled_under_autocast_is_eager():
    eager, compiled = problem(), problem()
    wanted = sample_next_token(**eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = torch.compile(sample_next_token, fullgraph=True, backend="aot_eager")
        tokens = run(**compiled)
    assert torch.equal(tokens, wanted) and torch.equal(compiled["x"], eager["x"])


# The kernel, in the interpreter.


def assert_same_as_body(arguments):
    """Tokens, and all that is overwritten. The sums over D differ: in none of these problems does a
    token hang by so little."""
    ours = copy(arguments)
    wanted = sample_next_token(**arguments)
    with through_kernels():
        tokens = sample_next_token(**ours)
    assert torch.equal(tokens, wanted)
    assert torch.equal(ours["x"], arguments["x"])
    for name in ("finished", "counters"):
        assert arguments[name] is None or torch.equal(ours[name], arguments[name])


def test_there_is_a_kernel():
    assert implementations()["sample_next_token"]["cuda"] == "triton"


@interpreted
@cases
def test_kernel(poisoned, case):
    pytest.importorskip("triton")
    assert_same_as_body(problem(**case))


@interpreted
@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.float16])
@pytest.mark.parametrize("D", [16, 100, 128, 260])
def test_kernel_with_every_type_of_weight(poisoned, dtype, D):
    pytest.importorskip("triton")
    arguments = problem(dtype=dtype, D=D)
    if dtype == torch.int8:  # whose body on a CPU rounds, where the kernel does not
        ours = copy(arguments)
        wanted = reference.sample_next_token(**arguments)
        with through_kernels():
            assert torch.equal(sample_next_token(**ours), wanted)
        assert torch.equal(ours["x"], arguments["x"])
    else:
        assert_same_as_body(arguments)


@interpreted
def test_kernel_with_narrow_norms_and_embeddings(poisoned):
    pytest.importorskip("triton")
    arguments = problem(dtype=torch.float16)
    for name in ("norm_weight", "norm_bias", "embedding"):
        arguments[name] = arguments[name].half()
    assert_same_as_body(arguments)


@interpreted
def test_kernel_over_several_steps(poisoned):
    """Each step starts from the embeddings of the one before, and from its counter."""
    pytest.importorskip("triton")
    arguments = problem(B=5, eos_from=2, temperature=2.0)
    ours = copy(arguments)
    for step in range(6):
        wanted = sample_next_token(**arguments | {"step": torch.tensor(step)})
        with through_kernels():
            tokens = sample_next_token(**ours | {"step": torch.tensor(step)})
        assert torch.equal(tokens, wanted) and ours["counters"].item() == 0
        assert torch.equal(ours["x"], arguments["x"])


@interpreted
@pytest.mark.parametrize("guided", [False, True])
def test_rows_of_the_kernel_are_independent_bit_for_bit(monkeypatch, guided):
    pytest.importorskip("triton")
    kernel = pytest.importorskip("musiclm_kernels.sampling.next_token")
    allocated, empty = [], torch.empty

    def remember(*args, **kwargs):
        allocated.append(empty(*args, **kwargs))
        return allocated[-1]

    monkeypatch.setattr(kernel.torch, "empty", remember)
    arguments = problem(B=5, D=100, guided=guided)

    def run(rows):
        allocated.clear()
        with through_kernels():
            tokens = sample_next_token(**rows_of(arguments, rows))
        logits = next(x for x in allocated if x.dtype == torch.float32)
        return tokens, logits.unflatten(0, (-1, len(tokens)))

    tokens, logits = run(slice(0, 5))
    for rows in (slice(0, 1), slice(4, 5), slice(1, 4)):
        some_tokens, some_logits = run(rows)
        assert torch.equal(some_tokens, tokens[rows])
        assert torch.equal(some_logits, logits[:, rows])


@pytest.mark.parametrize("V, D", [(1024, 1024), (1025, 768), (8192, 4096), (2, 16)])
def test_the_number_of_rows_cuts_no_sum_in_another_way(V, D):
    kernel = pytest.importorskip("musiclm_kernels.sampling.next_token")
    *sums, rows, warps = kernel._blocks(1, V, D)
    for B in (2, 3, 16, 100):
        *others, more_rows, other_warps = kernel._blocks(B, V, D)
        assert (others, other_warps) == (sums, warps) and more_rows >= rows


@interpreted
def test_kernel_without_rows():
    pytest.importorskip("triton")
    assert_same_as_body(problem(B=0))


@interpreted
@pytest.mark.parametrize("sizes", [{"V": 8193, "D": 2}, {"V": 4, "D": 4097}])
def test_kernel_refuses_what_does_not_fit(sizes):
    pytest.importorskip("triton")
    with through_kernels(), pytest.raises(ValueError, match="wanted at most 8192 of 4096"):
        sample_next_token(**problem(L=1, **sizes))


@interpreted
@pytest.mark.parametrize("case", ["guided", "bare"])
def test_the_op_contract_of_the_kernel(case):
    pytest.importorskip("triton")
    op = torch.ops.musiclm.sample_next_token.default
    with through_kernels():
        torch.library.opcheck(op, op_arguments(problem(**CASES[case])))
