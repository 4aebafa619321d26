import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import musiclm_kernels
from musiclm_kernels import contrastive_loss, reference
from musiclm_kernels.contrastive import blocked

KINDS = ["softmax", "decoupled", "sigmoid"]


def pairs(B=5, D=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, B, D, generator=generator, dtype=torch.float64)
    audio, text = F.normalize(rows, dim=-1).to(dtype)
    return audio, text


def by_loops(audio, text, temperature, kind, bias):
    B = len(audio)
    s = [[float(temperature * audio[i].dot(text[j])) for j in range(B)] for i in range(B)]
    total = 0.0
    for i in range(B):
        if kind == "sigmoid":
            for j in range(B):
                sign = 1 if i == j else -1
                total += math.log1p(math.exp(-sign * (s[i][j] + bias))) / B
            continue
        others = [j for j in range(B) if kind == "softmax" or j != i]
        to_text = math.log(sum(math.exp(s[i][j]) for j in others)) - s[i][i]
        to_audio = math.log(sum(math.exp(s[j][i]) for j in others)) - s[i][i]
        total += (to_text + to_audio) / (2 * B)
    return total


@pytest.mark.parametrize("function", [contrastive_loss, reference.contrastive_loss])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B", [2, 5, 33])
def test_matches_loops(function, kind, B):
    audio, text = pairs(B)
    bias = -1.5 if kind == "sigmoid" else None
    loss = function(audio, text, 7.0, kind=kind, bias=bias)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_loops(audio, text, 7.0, kind, bias), rel=1e-12)


def test_softmax_is_the_mean_of_both_cross_entropies():
    audio, text = pairs()
    scores, own = 3.0 * audio @ text.mT, torch.arange(5)
    wanted = (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2
    torch.testing.assert_close(contrastive_loss(audio, text, 3.0), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    audio, text = (x.requires_grad_() for x in pairs(4, 3))
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    leaves = (audio, text, temperature) + ((bias,) if kind == "sigmoid" else ())

    def loss(audio, text, temperature, bias=None):
        return contrastive_loss(audio, text, temperature, kind=kind, bias=bias) * 3

    assert torch.autograd.gradcheck(loss, leaves)


def test_a_second_derivative_is_refused():
    audio, text = (x.requires_grad_() for x in pairs())
    (first,) = torch.autograd.grad(contrastive_loss(audio, text, 2.0), audio, create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_gradient cannot be differentiated"):
        first.sum().backward()


def test_a_second_derivative_by_the_rows_of_one_by_the_temperature_is_refused():
    audio, text = (x.requires_grad_() for x in pairs())
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(audio, text, temperature)
    (first,) = torch.autograd.grad(loss, temperature, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.backward()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("score", [80.0, 88.0, 92.0, 99.0, 101.0, 1000.0])
def test_a_rival_far_ahead_costs_what_it_is_ahead(kind, score):
    """Where exp(score) is no float32 any more, and on both sides of it."""
    audio = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    loss = contrastive_loss(audio, text, score, kind=kind)
    wanted = torch.tensor(score + (0 if kind == "softmax" else math.log(2)))
    torch.testing.assert_close(loss.detach(), wanted)
    (grad,) = torch.autograd.grad(loss, audio)
    wide = audio.detach().double().requires_grad_()
    wanted = reference.contrastive_loss(wide, text.double(), score, kind=kind)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, wide)[0].float())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_autograd_through_the_reference(kind):
    audio, text = (x.requires_grad_() for x in pairs(33, 8))
    temperature = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    leaves = (audio, text, temperature)
    ours, theirs = (
        torch.autograd.grad(function(audio, text, temperature, kind=kind), leaves)
        for function in (contrastive_loss, reference.contrastive_loss)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_stays_finite_at_large_temperatures(kind):
    audio, text = (x.requires_grad_() for x in pairs(dtype=torch.float32))
    loss = contrastive_loss(audio, text, 1e4, kind=kind)
    loss.backward()
    assert loss.isfinite() and audio.grad.isfinite().all() and text.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_fp32(kind, dtype):
    audio, text = (x.requires_grad_() for x in pairs(dtype=dtype))
    loss = contrastive_loss(audio, text, 5.0, kind=kind)
    exact = contrastive_loss(audio.double(), text.double(), 5.0, kind=kind)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert audio.grad.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_pairs_and_the_two_sides_do_not_matter(kind):
    audio, text = pairs()
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = contrastive_loss(audio, text, 5.0, kind=kind)
    torch.testing.assert_close(contrastive_loss(audio[order], text[order], 5.0, kind=kind), loss)
    torch.testing.assert_close(contrastive_loss(text, audio, 5.0, kind=kind), loss)


def test_one_pair():
    audio, text = pairs(1)
    assert contrastive_loss(audio, text, 5.0).item() == pytest.approx(0.0, abs=1e-12)
    wanted = math.log1p(math.exp(-5.0 * float(audio[0].dot(text[0]))))
    assert contrastive_loss(audio, text, 5.0, kind="sigmoid").item() == pytest.approx(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_op_contracts(kind):
    audio, text = (x[None].requires_grad_() for x in pairs(dtype=torch.float32))
    temperature = torch.tensor([5.0], requires_grad=True)
    bias = torch.tensor([-1.0], requires_grad=True) if kind == "sigmoid" else None
    statistics = torch.ops.musiclm.contrastive_loss.default
    torch.library.opcheck(statistics, (audio, text, temperature, bias, kind, 0, 5))
    audio, text, temperature = audio.detach(), text.detach(), temperature.detach()
    bias = None if bias is None else bias.detach()
    _, log_sums, _ = statistics(audio, text, temperature, bias, kind, 0, 5)
    gradient = torch.ops.musiclm.contrastive_gradient.default
    arguments = (audio, text, log_sums, temperature, bias, kind, 1, 3)
    torch.library.opcheck(gradient, (torch.ones(1), *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_separate_losses(kind):
    audio, text = (
        torch.stack(x) for x in zip(*(pairs(9, 6, seed=n) for n in range(3)), strict=True)
    )
    temperature = torch.tensor([2.0, 7.0, 30.0], dtype=torch.float64)
    bias = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64) if kind == "sigmoid" else None
    losses = contrastive_loss(audio, text, temperature, kind=kind, bias=bias)
    for n in range(3):
        own_bias = None if bias is None else bias[n]
        alone = contrastive_loss(audio[n], text[n], temperature[n], kind=kind, bias=own_bias)
        torch.testing.assert_close(losses[n], alone)
    plain = reference.contrastive_loss(audio, text, temperature, kind=kind, bias=bias)
    torch.testing.assert_close(losses, plain)
    shared = contrastive_loss(audio, text, 3.0, kind=kind)
    torch.testing.assert_close(shared[1], contrastive_loss(audio[1], text[1], 3.0, kind=kind))


@pytest.mark.parametrize("function", [musiclm_kernels, reference])
@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_ranges_add_up_and_their_gradients_are_exact(function, kind, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_SCORES", 64)  # several blocks a range
    B, temperature = 33, torch.tensor([6.0, 20.0], dtype=torch.float64)
    audio, text = (torch.stack(x) for x in zip(pairs(B, 7), pairs(B, 7, seed=1), strict=True))
    bias = torch.tensor([-2.0, 1.0], dtype=torch.float64) if kind == "sigmoid" else None
    leaves = [audio, text, temperature] + ([] if bias is None else [bias])
    leaves = [x.requires_grad_() for x in leaves]
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    whole = reference.contrastive_loss(audio, text, temperature, kind=kind, bias=bias)
    wanted = torch.autograd.grad(whole @ weights, leaves)
    given = [x.detach() for x in leaves]
    rest = {"kind": kind, "bias": None if bias is None else given[3]}
    ranges = ((0, 20), (20, 1), (21, 12))
    parts = [
        function.contrastive_statistics(*given[:3], **rest, first=first, count=count)
        for first, count in ranges
    ]
    losses, log_sums, slopes = zip(*parts, strict=True)
    torch.testing.assert_close(sum(losses), whole.detach())
    torch.testing.assert_close(sum(slopes)[0] * weights, wanted[2])
    if bias is not None:
        torch.testing.assert_close(sum(slopes)[1] * weights, wanted[3])
    gathered = torch.cat(log_sums, dim=2)
    gradients = [
        function.contrastive_gradient(
            weights, given[0], given[1], gathered, given[2], **rest, first=first, count=count
        )
        for first, count in ranges
    ]
    for side in range(2):
        found = torch.cat([part[side] for part in gradients], dim=1)
        torch.testing.assert_close(found, wanted[side])


def test_no_tensor_of_all_pairs():
    """Live bytes at their highest, of what both passes allocate beyond their results."""
    B, D = 8192, 128
    audio, text = (x[None] for x in pairs(B, D, dtype=torch.float32))
    scalar = torch.tensor([10.0])

    class Live(TorchDispatchMode):
        bytes, highest = 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {
                x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)
            }
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if is_tensor(x) and x.untyped_storage()._cdata not in known:
                    size = x.untyped_storage().nbytes()
                    self.bytes += size
                    self.highest = max(self.highest, self.bytes)
                    weakref.finalize(x.untyped_storage(), self.freed, size)
            return out

        def freed(self, size):
            self.bytes -= size

    options = (scalar, None, "softmax", 0, B)
    with Live() as live:  # the bodies themselves: a mode sees an op as one call
        _, log_sums, _ = blocked.contrastive_statistics(audio, text, *options)
        blocked.contrastive_gradient(torch.ones(1), audio, text, log_sums, *options)
    results = 2 * B * D * 4
    assert results + 2**17 < live.highest < results + 0.01 * B * B * 4


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager(kind):
    audio, text = (x.requires_grad_() for x in pairs(dtype=torch.float32))
    temperature = torch.tensor(5.0, requires_grad=True)

    def loss(audio, text, temperature):
        return contrastive_loss(audio, text, temperature, kind=kind)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (audio, text, temperature)
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_compiles_without_graph_break():
    audio, text = (x.requires_grad_() for x in pairs(dtype=torch.float32))
    temperature = torch.tensor(5.0, requires_grad=True)
    leaves = (audio, text, temperature)

    def loss(audio, text, temperature):
        decoupled = contrastive_loss(audio, text, temperature, kind="decoupled")
        return decoupled + contrastive_loss(audio, text, 2.0, kind="sigmoid", bias=-1.0)

    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, loss(*leaves))
    ours = torch.autograd.grad(compiled, leaves)
    for one, other in zip(ours, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"kind": "hinge"}, "kind is 'hinge'"),
        ({"audio": torch.zeros(5)}, "audio has shape"),
        ({"audio": torch.zeros(5, 4, dtype=torch.int64)}, "audio is torch.int64"),
        ({"text": torch.zeros(6, 4)}, "text has shape"),
        ({"text": torch.zeros(5, 4).half()}, "text is torch.float16"),
        ({"temperature": torch.ones(1)}, "temperature has shape"),
        ({"temperature": torch.tensor(1)}, "temperature is torch.int64"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"bias": 1.0}, "bias is given with kind 'softmax'"),
        ({"audio": torch.zeros(0, 4), "text": torch.zeros(0, 4)}, "audio has 0 rows"),
        (
            {"audio": torch.zeros(1, 4), "text": torch.zeros(1, 4), "kind": "decoupled"},
            "audio has 1 rows, wanted at least 2",
        ),
    ],
)
def test_refusals(change, name):
    audio, text = pairs(dtype=torch.float32)
    arguments = {"audio": audio, "text": text, "temperature": 2.0} | change
    with pytest.raises(ValueError, match=name):
        contrastive_loss(**arguments)
