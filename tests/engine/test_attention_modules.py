"""Properties of the attention modules that hold whatever the numbers are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from musiclm_engine.attention import (
    AlibiBias,
    CosineAttention,
    DynamicPositionBias2d,
    MultiQueryAttention,
    RelativePositionBias,
    T5Attention,
    WindowAttention,
    cosine,
    multi_query,
    shifted_window_regions,
    t5,
    window,
)

DIM, HEADS, WIDTH = 16, 2, 8
T5_CONFIG = SimpleNamespace(
    d_model=DIM,
    d_kv=WIDTH,
    num_heads=HEADS,
    dropout_rate=0.0,
    is_decoder=False,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
)


def cosine_attention(**arguments) -> CosineAttention:
    torch.manual_seed(0)
    return CosineAttention(DIM, dim_head=WIDTH, heads=HEADS, **arguments)


def multi_query_attention(**arguments) -> MultiQueryAttention:
    torch.manual_seed(0)
    return MultiQueryAttention(DIM, dim_head=WIDTH, heads=HEADS, **({"dropout": 0.0} | arguments))


def window_attention(**arguments) -> WindowAttention:
    torch.manual_seed(0)
    return WindowAttention(DIM, (2, 3), HEADS, **arguments)


def t5_attention(**arguments) -> T5Attention:
    torch.manual_seed(0)
    return T5Attention(T5_CONFIG, True, **arguments)


def relative_bias(num_queries: int, num_keys: int):
    torch.manual_seed(1)
    return RelativePositionBias(dim=8, heads=HEADS).position_bias(num_queries, num_keys)


def tokens(batch: int, length: int, dim: int = DIM) -> torch.Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("make", [cosine_attention, multi_query_attention])
def test_a_table_and_its_pairs_give_the_same(make):
    attention, x, bias = make(causal=True), tokens(2, 5), relative_bias(5, 5)
    wanted = attention(x, rel_pos_bias=bias) if make is cosine_attention else None
    if wanted is None:
        wanted = attention(x, attn_bias=bias)
        torch.testing.assert_close(attention(x, attn_bias=bias.dense()[0]), wanted)
    else:
        torch.testing.assert_close(attention(x, bias.dense()), wanted)
    assert not torch.allclose(attention(x), wanted, atol=1e-4)


@torch.no_grad()
def test_null_keys_and_a_prefix_have_no_bias():
    attention, x, bias = multi_query_attention(num_null_kv=2), tokens(2, 5), relative_bias(5, 5)
    prefix = tokens(2, 3)
    table = attention(x, attn_bias=bias, prefix_context=prefix)
    torch.testing.assert_close(attention(x, attn_bias=bias.dense(), prefix_context=prefix), table)
    broadcast = torch.tensor(0.7).expand(1, 1)
    full = attention(x, attn_bias=broadcast.expand(5, 5), prefix_context=prefix)
    torch.testing.assert_close(attention(x, attn_bias=broadcast, prefix_context=prefix), full)
    q = attention.to_q(attention.norm(x)).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    keys, values = attention.to_kv(torch.cat((prefix, x), dim=1)).chunk(2, dim=-1)
    keys, values = (
        torch.cat((null.expand(2, -1, -1), mine), dim=1)
        for null, mine in zip(attention.null_kv, (keys, values), strict=True)
    )
    scores = q @ keys[:, None].mT * WIDTH**-0.5
    scores[..., 5:] += bias.dense()
    wanted = attention.to_out((scores.softmax(-1) @ values[:, None]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(table, wanted)


@torch.no_grad()
@pytest.mark.parametrize("make", [cosine_attention, multi_query_attention, t5_attention])
def test_a_later_token_changes_nothing_earlier(make):
    attention = make(**({"is_causal": True} if make is t5_attention else {"causal": True}))
    x = tokens(2, 6)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = (
        output[0] if make is t5_attention else output
        for output in (attention(x), attention(changed))
    )
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("make", [cosine_attention, multi_query_attention, t5_attention])
def test_a_padded_row_is_as_it_is_alone(make):
    attention, x = make(), tokens(2, 6)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    if make is t5_attention:
        padded, alone = attention(x, mask=mask[:, None, None])[0], attention(x[1:, :4])[0]
        added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]
        torch.testing.assert_close(attention(x, mask=added)[0], padded)
        every_pair = mask[:, None, None].expand(-1, 1, 6, -1)
        torch.testing.assert_close(attention(x, mask=every_pair)[0], padded)
    else:
        padded, alone = attention(x, mask=mask), attention(x[1:, :4])
    torch.testing.assert_close(padded[1:, :4], alone)


@torch.no_grad()
@pytest.mark.parametrize("make", [cosine_attention, multi_query_attention, t5_attention])
def test_a_row_without_keys_attends_to_nothing(make):
    attention, mask = make(), torch.zeros(1, 4, dtype=torch.bool)
    output = (
        attention(tokens(1, 4), mask=mask[:, None, None])[0]
        if make is t5_attention
        else attention(tokens(1, 4), mask=mask)
    )
    assert torch.equal(output, torch.zeros(1, 4, DIM))


@torch.no_grad()
def test_a_masked_context_leaves_the_null_keys():
    attention = multi_query_attention(num_null_kv=1, dim_context=5, norm_context=True)
    output = attention(
        tokens(2, 3), tokens(2, 4, 5), torch.zeros(2, 4, dtype=torch.bool)
    )  # every head reads the null value
    wanted = attention.to_out(attention.null_kv[1].repeat(1, HEADS))
    torch.testing.assert_close(output, wanted.expand(2, 3, DIM))


@torch.no_grad()
@pytest.mark.parametrize("flash", [False, True])
def test_token_by_token_with_a_cache_is_the_whole(flash):
    attention, x = multi_query_attention(causal=True, flash=flash), tokens(2, 6)
    whole = attention(x, attn_bias=relative_bias(6, 6))
    first, cache = attention(x[:, :2], attn_bias=relative_bias(2, 2), return_kv_cache=True)
    steps = [first]
    for n in range(2, 6):
        step, cache = attention(
            x[:, n : n + 1],
            attn_bias=relative_bias(1, n + 1),
            kv_cache=cache,
            return_kv_cache=True,
        )
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    assert cache.shape == (2, 2, 6, WIDTH)


@torch.no_grad()
def test_regions_of_shifted_windows_are_swins_mask():
    torch.manual_seed(0)
    size, windows, shift = (6, 9), (2, 3), (1, 1)
    regions = shifted_window_regions(size, windows, shift)
    # as torchvision numbers them (models/swin_transformer.py), each token of the image
    numbers = torch.zeros(size)
    for n, rows in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
        for m, columns in enumerate((slice(0, -3), slice(-3, -1), slice(-1, None))):
            numbers[rows, columns] = 3 * n + m
    numbers = numbers.unfold(0, 2, 2).unfold(1, 3, 3).flatten(2).flatten(0, 1)
    mask = -100.0 * (numbers[:, None, :] != numbers[:, :, None])
    assert torch.equal(mask != 0, regions[:, None, :] != regions[:, :, None])
    assert regions.shape == (9, 6) and regions.unique().tolist() == [0, 1, 2, 3]

    attention, x = window_attention(), tokens(18, 6)
    attention.logit_scale += 3  # sharp: -100 must be -100 and not much more
    masked = attention(x, mask)
    torch.testing.assert_close(attention(x, regions=regions), masked)
    assert not torch.allclose(attention(x), masked)
    assert not shifted_window_regions(size, windows, (0, 0)).any()


@torch.no_grad()
def test_a_window_may_change_its_size():
    attention = window_attention(pretrained_window_size=4)
    attention.set_window_size(3)
    other = WindowAttention(DIM, (3, 3), HEADS, pretrained_window_size=(4, 4))
    other.load_state_dict(attention.state_dict())
    assert torch.equal(attention(tokens(2, 9)), other(tokens(2, 9)))


@torch.no_grad()
def test_t5_layers_share_one_bias():
    first, x = t5_attention(), tokens(2, 6)
    second = T5Attention(T5_CONFIG)
    second.load_state_dict(first.state_dict(), strict=False)
    output, bias, weights = first(x)
    assert weights is None and bias.table.shape == (HEADS, 11)
    torch.testing.assert_close(second(x, position_bias=bias)[0], output)
    torch.testing.assert_close(second(x, position_bias=bias.dense())[0], output)
    assert second(x)[1] is None


BIAS = relative_bias(6, 6)
MODULES = [
    (cosine, lambda p: cosine_attention(dropout=p), lambda m, x: m(x, BIAS)),
    (multi_query, lambda p: multi_query_attention(dropout=p), lambda m, x: m(x)),
    (window, lambda p: window_attention(attn_drop=p), lambda m, x: m(x)),
    (
        t5,
        lambda p: T5Attention(SimpleNamespace(**(vars(T5_CONFIG) | {"dropout_rate": p}))),
        lambda m, x: m(x)[0],
    ),
]
EVERY_MODULE = pytest.mark.parametrize(
    ("where", "make", "call"), MODULES, ids=[module.__name__ for module, *_ in MODULES]
)


@EVERY_MODULE
def test_dropout_of_the_probabilities_is_the_ops(monkeypatch, where, make, call):
    rates = []
    original = where.biased_attention

    def recording(*tensors, dropout, **arguments):
        rates.append(dropout)
        return original(*tensors, dropout=dropout, **arguments)

    monkeypatch.setattr(where, "biased_attention", recording)
    module, x = make(0.5), tokens(2, 6)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # what is left is the op's
    torch.manual_seed(3)
    first, second = call(module, x), call(module, x)
    torch.manual_seed(3)
    assert torch.equal(call(module, x), first) and not torch.allclose(first, second)
    module.eval()
    exact = call(module, x)
    assert torch.equal(call(module, x), exact)
    assert rates == [0.5, 0.5, 0.5, 0.0, 0.0]


@EVERY_MODULE
def test_dropout_is_right_on_average(where, make, call):
    module = make(0.3).eval()
    x = tokens(1, 6)
    with torch.no_grad():
        exact = call(module, x)
        module.train()
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        torch.manual_seed(4)
        mean = torch.stack([call(module, x) for _ in range(200)]).mean(0)
    torch.testing.assert_close(mean, exact, atol=0.1, rtol=0)


@EVERY_MODULE
def test_modules_compile_whole(where, make, call):
    module, x = make(0.0), tokens(2, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, traced = call(module, x), call(compiled, x)
    torch.testing.assert_close(traced, eager)
    weights = list(module.parameters())
    grads = [torch.autograd.grad(out.square().sum(), weights) for out in (traced, eager)]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_dropout_compiles_whole():
    module, x = cosine_attention(dropout=0.5), tokens(2, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outputs = [compiled(x) for _ in range(2)]
    outputs[0].sum().backward()
    assert not torch.allclose(*outputs)
    assert all(torch.isfinite(weight.grad).all() for weight in module.parameters())


class WithBias(nn.Module):
    """Two layers that share the bias which they are given."""

    def __init__(self, bias: nn.Module, *arguments: int) -> None:
        super().__init__()
        self.bias, self.arguments = bias, arguments
        self.layers = nn.ModuleList(cosine_attention() for _ in range(2))

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        bias = self.bias.position_bias(*self.arguments).kept(indices)
        for layer in self.layers:
            x = x + layer(x, bias)
        return x


@pytest.mark.parametrize(
    ("bias", "arguments"),
    [
        (RelativePositionBias(dim=4, heads=HEADS), (8, 8)),
        (DynamicPositionBias2d(4, HEADS), (4, 2)),
        (AlibiBias(HEADS, symmetric=True), (8, 8)),
    ],
    ids=lambda argument: type(argument).__name__,
)
def test_biases_compile_whole(bias, arguments):
    model, x = WithBias(bias, *arguments), tokens(2, 6)
    indices = torch.tensor([[0, 1, 3, 4, 6, 7], [0, 2, 3, 5, 6, 7]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager, traced = model(x, indices), compiled(x, indices)
    torch.testing.assert_close(traced, eager)
    weights = list(model.parameters())
    grads = [torch.autograd.grad(out.square().sum(), weights) for out in (traced, eager)]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_shifted_windows_and_caches_compile_whole():
    attention, x = window_attention(), tokens(4, 6)
    regions = shifted_window_regions((2, 6), (2, 3), (0, 1))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, regions=regions), attention(x, regions=regions))
    mask = -100.0 * (regions[:, :, None] != regions[:, None, :])
    torch.testing.assert_close(compiled(x, mask), attention(x, mask))

    decoder, bias = multi_query_attention(causal=True, num_null_kv=1), relative_bias(6, 9)
    arguments = {"attn_bias": bias, "kv_cache": tokens(2, 4 * 3).view(2, 4, 3, -1)[..., :WIDTH]}
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **arguments), decoder(x, **arguments))


@EVERY_MODULE
def test_half_precision_is_alike(where, make, call):
    module, x = make(0.0), tokens(2, 6)
    with torch.no_grad():
        exact = call(module, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (call(module, x) - exact).abs().max() < 0.05
        halved = call(module.bfloat16(), x.bfloat16())
    assert halved.dtype == torch.bfloat16 and (halved - exact).abs().max() < 0.05


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: cosine_attention()(x, torch.zeros(3, 6, 6)), "rel_pos_bias has shape"),
        (lambda x: multi_query_attention()(x, attn_bias=torch.zeros(6, 5)), "attn_bias has shape"),
        (
            lambda x: multi_query_attention()(x, kv_cache=tokens(2, 2), prefix_context=x),
            "kv_cache",
        ),
        (
            lambda x: multi_query_attention()(x, prefix_context_mask=x[..., 0] > 0),
            "prefix_context_mask",
        ),
        (lambda x: multi_query_attention()(x, mask=x[:, 1:, 0] > 0), "key_mask"),
        (lambda x: window_attention()(x[:, 1:]), r"x has shape \(2, 5, 16\)"),
        (lambda x: window_attention()(x, torch.zeros(2, 6, 5)), "mask has shape"),
        (lambda x: window_attention()(x, torch.zeros(3, 6, 6)), "mask has shape"),
        (lambda x: window_attention()(x, regions=torch.zeros(2, 5)), "regions has shape"),
        (
            lambda x: window_attention()(x, torch.zeros(1, 6, 6), regions=torch.zeros(1, 6)),
            "mask and regions",
        ),
        (lambda x: WindowAttention(DIM, (2, 3), 3), "num_heads=3"),
        (lambda x: shifted_window_regions((4, 5), (2, 2), (1, 1)), "size="),
        (lambda x: shifted_window_regions((4, 4), (2, 2), (1, 2)), "shift_size="),
        (lambda x: t5_attention()(x, past_key_values=object()), "past_key_values"),
        (lambda x: t5_attention()(x, output_attentions=True), "output_attentions"),
        (lambda x: t5_attention()(x, mask=torch.zeros(2, 1, 5, 6)), "mask has shape"),
        (lambda x: t5_attention()(x, mask=torch.ones(2, 1, 1, 5).bool()), "mask has shape"),
        (lambda x: t5_attention()(x, position_bias=torch.zeros(1, 2, 6, 5)), "position_bias has"),
    ],
)
def test_refusals_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call(tokens(2, 6))
