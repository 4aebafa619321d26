import math

import pytest
import torch
import torch.nn.functional as F

from musiclm_kernels import contrastive_loss, reference

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
    with pytest.raises(RuntimeError, match="contrastive_loss_backward cannot be differentiated"):
        first.sum().backward()


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
    audio, text = (x.requires_grad_() for x in pairs(dtype=torch.float32))
    temperature = torch.tensor(5.0, requires_grad=True)
    bias = torch.tensor(-1.0, requires_grad=True) if kind == "sigmoid" else None
    arguments = (audio, text, temperature, bias, kind)
    torch.library.opcheck(torch.ops.musiclm.contrastive_loss.default, arguments)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    backward = torch.ops.musiclm.contrastive_loss_backward.default
    torch.library.opcheck(backward, (torch.tensor(1.0), *detached))


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
