from contextlib import nullcontext

import pytest
import torch

from musiclm_kernels import implementations, qk_l2norm, reference
from musiclm_kernels.testing import through_kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])


def running_kernels():
    """On a GPU the ops run their kernels as it is; without one, in Triton's interpreter."""
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


def inputs(
    B=2, H=4, Hkv=2, N=5, M=7, D=8, dtype=torch.float64, per_head=(True, False), layout="projected"
):
    """Four leaves. "projected" is a [B, N, H, D] projection seen as [B, H, N, D]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, wide=False):
        kept = torch.promote_types(dtype, torch.float32) if wide else dtype
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kept)

    def rows(heads, length):
        if layout == "projected":
            return draw(B, length, heads, D).transpose(1, 2)
        if layout == "fused":  # one of two that a projection gives: rows with gaps between
            return draw(B, length, 2, heads, D)[:, :, 1].transpose(1, 2)
        if layout == "columns":  # the last stride is not 1
            return draw(B, heads, D, length).transpose(2, 3)
        if layout == "shared":  # every head the same rows
            return draw(B, 1, length, D).expand(B, heads, length, D)
        return draw(B, heads, length, D)

    scales = (
        draw(*((heads, D) if own else (D,)), wide=True)
        for heads, own in zip((H, Hkv), per_head, strict=True)
    )
    leaves = (rows(H, N), rows(Hkv, M), *scales)
    return tuple(x.to(DEVICE).requires_grad_() for x in leaves)


def draw_output_gradients(q, k):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (q, k)]


def outputs_and_gradients(function, leaves, grads=None):
    """q', k', and the gradients of the four leaves under a random gradient of both outputs."""
    outs = function(*leaves)
    return (*outs, *torch.autograd.grad(outs, leaves, grads or draw_output_gradients(*leaves[:2])))


def assert_within_budget(ours, leaves):
    """Against float64, at most twice what the definition errs in this dtype, and two roundings: the
    result's, and that of the inverse root, which a GPU gives to 2^-22.9."""
    exact_leaves = tuple(x.detach().double().requires_grad_() for x in leaves)
    grads = [x.double() for x in draw_output_gradients(*leaves[:2])]
    exact = outputs_and_gradients(reference.qk_l2norm, exact_leaves, grads)
    plain = outputs_and_gradients(reference.qk_l2norm, leaves)
    names = ("q'", "k'", "grad q", "grad k", "grad q_scale", "grad k_scale")
    for name, one, definition, truth in zip(names, ours, plain, exact, strict=True):
        assert one.dtype == definition.dtype and one.shape == truth.shape, name
        if truth.numel() == 0:
            continue
        error = (one - truth).abs().max().item()
        own = (definition - truth).abs().max().item()
        rounding = 2 * torch.finfo(one.dtype).eps * truth.abs().max().item()
        assert error <= 2 * own + rounding, f"{name}: {error} > 2 * {own} + {rounding}"


def by_loops(x, scale):
    out = torch.empty(x.shape, dtype=x.dtype)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
        row = x[b, h, n].tolist()
        length = max(sum(value * value for value in row) ** 0.5, 1e-12)
        own = (scale[h] if scale.dim() == 2 else scale).tolist()
        out[b, h, n] = torch.tensor(
            [value / length * factor for value, factor in zip(row, own, strict=True)],
            dtype=x.dtype,
        )
    return out


@pytest.mark.parametrize("function", [qk_l2norm, reference.qk_l2norm])
@pytest.mark.parametrize("per_head", [(False, False), (True, True), (True, False)])
def test_matches_loops(function, per_head):
    leaves = inputs(per_head=per_head)
    with torch.no_grad():
        leaves[0][0, 1, 2] = 0
        leaves[1][0, 1, 2] *= 1e-14
    q_out, k_out = function(*leaves)
    torch.testing.assert_close(q_out.cpu(), by_loops(leaves[0], leaves[2]), rtol=1e-12, atol=0)
    torch.testing.assert_close(k_out.cpu(), by_loops(leaves[1], leaves[3]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("per_head", [(False, False), (True, True), (False, True)])
def test_gradients(per_head):
    leaves = inputs(B=2, H=2, Hkv=1, N=3, M=2, D=4, per_head=per_head)
    assert torch.autograd.gradcheck(qk_l2norm, leaves)


def test_gradients_match_autograd_through_the_reference():
    leaves = inputs(N=33, M=17)
    with torch.no_grad():  # where the clamp holds, and where it does by a little or does not
        leaves[0][0, 0, 0] = 0
        leaves[0][0, 0, 1] *= 1e-14
        leaves[1][1, 1, 0] *= 0.9e-12 / leaves[1][1, 1, 0].norm()
        leaves[1][1, 1, 1] *= 1.1e-12 / leaves[1][1, 1, 1].norm()
    ours = outputs_and_gradients(qk_l2norm, leaves)
    theirs = outputs_and_gradients(reference.qk_l2norm, leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    leaves = inputs()
    (first,) = torch.autograd.grad(qk_l2norm(*leaves)[0].sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="qk_l2norm_backward cannot be differentiated"):
        first.sum().backward()


def test_only_one_output_used():
    leaves = inputs()
    qk_l2norm(*leaves)[1].sum().backward()
    assert leaves[1].grad.any() and leaves[3].grad.any()
    assert not leaves[0].grad.any() and not leaves[2].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow_scales", [False, True])
def test_low_precision_is_rounded_once(dtype, narrow_scales):
    leaves = inputs(dtype=dtype)
    if narrow_scales:
        leaves = (*leaves[:2], *(x.detach().to(dtype).requires_grad_() for x in leaves[2:]))
    outs = qk_l2norm(*leaves)
    exact = qk_l2norm(*(x.double() for x in leaves))
    for out, truth in zip(outs, exact, strict=True):
        assert out.dtype == dtype
        # half a unit in the last place, and the error of fp32
        torch.testing.assert_close(
            out.double(), truth, rtol=torch.finfo(dtype).eps * 0.501, atol=1e-7
        )
    sum(out.float().sum() for out in outs).backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]


def test_under_autocast():
    leaves = inputs(dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = qk_l2norm(*leaves)
    for one, other in zip(inside, qk_l2norm(*leaves), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other)


LAYOUTS = ["packed", "projected", "fused", "columns", "shared"]


def assert_laid_out_like(x, y, layout):
    """y, made of x, has one of two layouts, and never gaps."""
    is_projection = layout in ("projected", "fused")
    assert y.transpose(1, 2).is_contiguous() == is_projection
    assert y.is_contiguous() != is_projection
    # The layouts that have something to lose did have it.
    assert (y.stride() == x.stride()) == (layout in ("packed", "projected"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [qk_l2norm, reference.qk_l2norm])
def test_outputs_are_laid_out_like_their_inputs_without_gaps(layout, function):
    leaves = inputs(layout=layout)
    for x, out in zip(leaves[:2], function(*leaves), strict=True):
        assert_laid_out_like(x, out, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_laid_out_like_their_inputs_without_gaps(layout):
    leaves = inputs(layout=layout)
    _, _, grad_q, grad_k, *_ = outputs_and_gradients(qk_l2norm, leaves)
    assert_laid_out_like(leaves[0], grad_q, layout)
    assert_laid_out_like(leaves[1], grad_k, layout)


# The kernels: on CPU in the interpreter.


def test_there_are_kernels():
    for name in ("qk_l2norm", "qk_l2norm_backward"):
        assert implementations()[name]["cuda"] == "triton"


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("D", [16, 48, 64, 128])
@pytest.mark.parametrize("N, M", [(1, 1), (33, 5), (1, 65), (150, 129)])
def test_kernel(poisoned, dtype, D, N, M):
    leaves = inputs(N=N, M=M, D=D, dtype=dtype)
    with running_kernels():
        assert torch.empty(1).isnan()
        ours = outputs_and_gradients(qk_l2norm, leaves)
    assert_within_budget(ours, leaves)


@pytest.mark.parametrize("D", [2, 3, 40, 100, 255, 256])
def test_kernel_at_odd_widths(poisoned, D):
    leaves = inputs(N=19, M=3, D=D, dtype=torch.float32)
    with running_kernels():
        ours = outputs_and_gradients(qk_l2norm, leaves)
    assert_within_budget(ours, leaves)


def test_kernel_at_width_one(poisoned):
    leaves = inputs(N=19, M=3, D=1, dtype=torch.float32)
    with running_kernels():
        q_out, k_out, grad_q, grad_k, *_ = outputs_and_gradients(qk_l2norm, leaves)
    q, k, q_scale, k_scale = leaves
    wanted = (q.sign() * q_scale.unsqueeze(1), k.sign() * k_scale)
    torch.testing.assert_close((q_out, k_out), wanted)
    # A sign does not follow its number: what is left is the rounding of two terms that cancel.
    grads = draw_output_gradients(q, k)
    for gradient, x, grad, out in zip((grad_q, grad_k), (q, k), grads, wanted, strict=True):
        assert (gradient.abs() <= 4 * torch.finfo(torch.float32).eps * (grad * out / x).abs()).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_head", [(False, False), (True, True), (False, True)])
def test_kernel_with_each_layout_and_scale(poisoned, layout, per_head):
    leaves = inputs(N=20, M=9, D=16, dtype=torch.float32, per_head=per_head, layout=layout)
    with running_kernels():
        ours = outputs_and_gradients(qk_l2norm, leaves)
    assert_within_budget(ours, leaves)
    on_cpu = tuple(x.detach().cpu().requires_grad_() for x in leaves)
    laid_out = outputs_and_gradients(qk_l2norm, on_cpu)
    assert [x.stride() for x in ours] == [x.stride() for x in laid_out]


@pytest.mark.parametrize("Hkv", [1, 4, 6])
def test_kernel_with_any_number_of_key_heads(poisoned, Hkv):
    leaves = inputs(Hkv=Hkv, N=3, M=9, D=16, dtype=torch.float32, per_head=(True, True))
    with running_kernels():
        ours = outputs_and_gradients(qk_l2norm, leaves)
    assert_within_budget(ours, leaves)


@pytest.mark.parametrize("max_partials, num_blocks", [(1000, 1), (30, 4), (1, 16)])
@pytest.mark.parametrize("per_head", [(False, True), (True, False)])
@pytest.mark.parametrize("N, M", [(42, 3), (5, 61)])
def test_kernel_with_several_tiles_a_program_and_several_turns_of_the_sum(
    poisoned, monkeypatch, max_partials, num_blocks, per_head, N, M
):
    kernel = pytest.importorskip("musiclm_kernels.qk_l2norm.kernel")
    launched = []

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                launched.append((grid[0], constants["NUM_BLOCKS"]))
                return original[grid](*arguments, **constants)

            return launch

    original = kernel._backward_kernel
    monkeypatch.setattr(kernel, "_backward_kernel", Spy())
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", 64)  # 4 rows of 16
    monkeypatch.setattr(kernel, "MAX_PARTIALS", max_partials)
    monkeypatch.setattr(kernel, "SUM_ROWS", 4)
    leaves = inputs(N=N, M=M, D=16, dtype=torch.float32, per_head=per_head)
    with running_kernels():
        ours = outputs_and_gradients(qk_l2norm, leaves)
    assert_within_budget(ours, leaves)
    ((num_programs, blocks),) = launched
    assert blocks == num_blocks
    assert num_programs > 2 * kernel.SUM_ROWS


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_where_rows_are_zero_or_below_the_clamp(poisoned, dtype):
    leaves = inputs(dtype=dtype)
    with torch.no_grad():
        leaves[0][0, 0, 0] = 0
        leaves[1][0, 1] = 0
        if dtype != torch.float16:  # which holds nothing so small
            leaves[0][0, 0, 1] *= 1e-14
            leaves[1][1, 1, 0] *= 0.9e-12 / leaves[1][1, 1, 0].norm()
            leaves[1][1, 1, 1] *= 1.1e-12 / leaves[1][1, 1, 1].norm()
    with running_kernels():
        ours = outputs_and_gradients(qk_l2norm, leaves)
    # Element by element: such gradients are 1e12 times the others, and infinite in float16.
    tolerance = 4 * torch.finfo(dtype).eps
    plain = outputs_and_gradients(reference.qk_l2norm, leaves)
    for one, definition in zip(ours[:4], plain[:4], strict=True):
        torch.testing.assert_close(one, definition, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sizes", [{"N": 0}, {"M": 0}, {"N": 0, "M": 0}, {"B": 0}, {"H": 0}, {"Hkv": 0}]
)
def test_kernel_without_rows(poisoned, sizes):
    leaves = inputs(**{"dtype": torch.float32, "D": 16} | sizes)
    with running_kernels():
        ours = outputs_and_gradients(qk_l2norm, leaves)
    assert_within_budget(ours, leaves)


def test_kernel_keeps_nan():
    leaves = inputs(D=16, dtype=torch.float32)
    with torch.no_grad():
        leaves[0][0, 0, 0, 3] = torch.nan
    with running_kernels():
        q_out, k_out = qk_l2norm(*leaves)
    assert q_out[0, 0, 0].isnan().all()
    assert q_out.isnan().sum() == 16 and k_out.isfinite().all()


def test_kernel_gives_the_same_bits_twice():
    leaves = inputs(N=150, M=70, D=64, dtype=torch.float32)
    with running_kernels():
        first, second = (outputs_and_gradients(qk_l2norm, leaves) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "per_head, dtype", [((False, False), torch.float32), ((True, True), torch.bfloat16)]
)
def test_op_contracts(layout, per_head, dtype):
    leaves = inputs(dtype=dtype, per_head=per_head, layout=layout)
    torch.library.opcheck(torch.ops.musiclm.qk_l2norm.default, leaves)
    detached = tuple(x.detach() for x in leaves)
    grads = tuple(torch.ones_like(x) for x in detached[:2])
    torch.library.opcheck(torch.ops.musiclm.qk_l2norm_backward.default, (*grads, *detached))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_contracts_of_the_kernels(layout):
    leaves = tuple(x.detach() for x in inputs(dtype=torch.float32, layout=layout))
    grads = tuple(torch.ones_like(x) for x in leaves[:2])
    with running_kernels():
        torch.library.opcheck(torch.ops.musiclm.qk_l2norm.default, leaves)
        torch.library.opcheck(torch.ops.musiclm.qk_l2norm_backward.default, (*grads, *leaves))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_graph_break(layout):
    leaves = inputs(dtype=torch.float32, layout=layout)
    # A compiled backward pass lays its gradients out like the outputs, which decides the order of
    # the reference's sums.
    drawn = draw_output_gradients(*leaves[:2])
    outs = qk_l2norm(*leaves)
    grads = [torch.empty_like(out).copy_(grad) for out, grad in zip(outs, drawn, strict=True)]
    compiled = torch.compile(qk_l2norm, fullgraph=True, backend="aot_eager")
    ours = outputs_and_gradients(compiled, leaves, grads)
    for one, other in zip(ours, outputs_and_gradients(qk_l2norm, leaves, grads), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 5, 8)}, r"q has shape \(2, 5, 8\)"),
        ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int64)}, "q is torch.int64"),
        ({"q": torch.zeros(2, 4, 5, 257)}, "q has width 257, wanted 1 to 256"),
        ({"q": torch.zeros(2, 4, 5, 0)}, "q has width 0"),
        ({"k": torch.zeros(2, 7, 8)}, "k has shape"),
        ({"k": torch.zeros(3, 2, 7, 8)}, "k has shape"),
        ({"k": torch.zeros(2, 2, 7, 9)}, "k has shape"),
        ({"k": torch.zeros(2, 2, 7, 8).half()}, "k is torch.float16"),
        ({"k": torch.zeros(2, 2, 7, 8, device="meta")}, "k is on meta"),
        ({"q_scale": torch.zeros(9)}, r"q_scale has shape \(9,\), wanted \(8,\) or \(4, 8\)"),
        ({"q_scale": torch.zeros(2, 8)}, "q_scale has shape"),
        ({"q_scale": torch.zeros(1, 8)}, "q_scale has shape"),
        ({"q_scale": torch.zeros(())}, "q_scale has shape"),
        ({"q_scale": torch.zeros(8).half()}, "q_scale is torch.float16"),
        ({"q_scale": torch.zeros(8, device="meta")}, "q_scale is on meta"),
        ({"k_scale": torch.zeros(4, 8)}, r"k_scale has shape \(4, 8\), wanted \(8,\) or \(2, 8\)"),
        ({"k_scale": torch.zeros(8).double()}, "k_scale is torch.float64"),
        ({"k_scale": torch.zeros(8, device="meta")}, "k_scale is on meta"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 7, 8),
        "q_scale": torch.zeros(8),
        "k_scale": torch.zeros(2, 8),
    }
    with pytest.raises(ValueError, match=message):
        qk_l2norm(**arguments | change)
