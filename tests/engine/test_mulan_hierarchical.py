"""The loss over layers, against sums in float64 over what enters the layer after each."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import musiclm_engine
from musiclm_engine.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    TextTransformer,
    encode_captions,
    train_caption_tokenizer,
)
from musiclm_engine.mulan.contrast import spread_layers
from musiclm_kernels import contrastive_loss

CAPTIONS = ["a slow hymn on an organ", "a fast reel on a fiddle", "drums alone", "a solo flute"]
LENGTHS = [8000, 2400, 8000, 5000]
PREFIX = "multi_layer_contrastive_learning."
KINDS = {
    "softmax": {"decoupled_contrastive_learning": False},
    "decoupled": {},
    "sigmoid": {"sigmoid_contrastive_loss": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_caption_tokenizer(CAPTIONS, 300)


@pytest.fixture
def build(tokenizer):
    def build(layers=None, hierarchical=True, audio_depth=5, text_depth=3, **arguments):
        torch.manual_seed(0)
        tower = {"dim_head": 16, "heads": 2}
        model = MuLaN(
            AudioSpectrogramTransformer(32, audio_depth, num_mels=64, **tower),
            TextTransformer(48, text_depth, num_tokens=300, max_seq_len=32, **tower),
            24,
            tokenizer=tokenizer,
            hierarchical_contrastive_loss=hierarchical,
            hierarchical_contrastive_loss_layers=layers,
            **arguments,
        )
        return model.double()

    return build


def noise(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return 0.3 * torch.randn(4, 8000, dtype=dtype, generator=generator)


def unequal(model):
    """Other scalars and gains for each layer than those that all start with."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(PREFIX):
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return model


def entering(tower, index, run):
    """What block `index` gives, seen where the next one takes it: one tensor for each pass."""
    seen = []
    attention = tower.transformer.layers[index + 1][0]
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen


def layer_loss(kind, audio, text, temperature, bias):
    scores = temperature * F.normalize(audio, dim=-1) @ F.normalize(text, dim=-1).T
    own = torch.eye(len(scores), dtype=torch.bool)
    if kind == "sigmoid":
        signed = torch.where(own, 1.0, -1.0) * (scores + bias)
        return torch.log1p(torch.exp(-signed)).sum() / len(scores)
    rivals = scores.masked_fill(own, -math.inf) if kind == "decoupled" else scores
    return (-scores.diag() + (rivals.logsumexp(0) + rivals.logsumexp(1)) / 2).mean()


def formula(model, kind, audio, audio_layers, text_layers):
    """The whole loss: each clip passes alone and uncut, so that no mask has a part in it."""
    clips = [clip[None, :length] for clip, length in zip(audio, LENGTHS, strict=True)]
    more = model.multi_layer_contrastive_learning
    last = [torch.cat([model.embed_audio(clip) for clip in clips]), model.embed_text(CAPTIONS)]
    bias = model.contrast.bias
    loss = layer_loss(kind, *last, model.contrast.temperatures.exp().squeeze(), bias)
    for i, (of_audio, of_text) in enumerate(zip(audio_layers, text_layers, strict=True)):
        tokens = entering(model.audio, of_audio, lambda: [model.audio(clip) for clip in clips])
        a = torch.cat([x.mean(dim=1) for x in tokens])
        a = F.layer_norm(a, (32,)) * more.audio_gamma[i]
        a = a @ more.audio_latent_weight[i] + more.audio_latent_bias[i]
        (tokens,) = entering(model.text, of_text, lambda: model.embed_text(CAPTIONS))
        t = F.layer_norm(tokens[:, 0], (48,)) * more.text_gamma[i]
        t = t @ more.text_latent_weight[i] + more.text_latent_bias[i]
        bias = None if more.contrast.bias is None else more.contrast.bias[i]
        loss = loss + layer_loss(kind, a, t, more.contrast.temperatures[i].exp(), bias)
    return loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "audio_layers", "text_layers"), [(None, [0, 2], [0, 1]), (1, [0], [0])]
)
def test_loss_and_gradients_are_those_of_the_formula(
    build, kind, layers, audio_layers, text_layers
):
    model = unequal(build(layers, **KINDS[kind])).eval()
    loss = model(noise(), CAPTIONS, lengths=torch.tensor(LENGTHS))
    wanted = formula(model, kind, noise(), audio_layers, text_layers)
    assert loss.shape == ()
    torch.testing.assert_close(loss, wanted)
    found, wanted = gradients(model, loss), gradients(model, wanted)
    for name, gradient in wanted.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_have_the_gradients_of_the_whole(build, kind):
    model = unequal(build(**KINDS[kind])).eval()
    losses = [
        model(noise(), CAPTIONS, lengths=torch.tensor(LENGTHS), chunk_size=size)
        for size in (None, 3, 1)
    ]
    whole, *chunked = (gradients(model, loss) for loss in losses)
    for loss, one in zip(losses[1:], chunked, strict=True):
        torch.testing.assert_close(loss, losses[0])
        for name, gradient in one.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-6, atol=1e-10, msg=name)


def test_every_parameter_gets_a_gradient_under_autocast(build):
    model = build().float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(noise(torch.float32), CAPTIONS, chunk_size=2)
    assert torch.isfinite(loss)
    for name, gradient in gradients(model, loss).items():
        assert gradient.any() and gradient.isfinite().all(), name


def test_it_aligns_the_layers_before_the_last(build):
    model = build().float().eval()  # nothing is masked: it is the loss that is looked at
    audio = torch.sin(torch.tensor([0.08, 0.2, 0.5, 1.2])[:, None] * torch.arange(8000))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(audio, CAPTIONS).backward()
        optimizer.step()
    more = model.multi_layer_contrastive_learning
    a = more.audio_latents(model.audio(audio, return_all_layers=True)[1][[0, 2]])
    ids = encode_captions(model.tokenizer, CAPTIONS, 32)
    t = more.text_latents(model.text(ids, return_all_layers=True)[1][[0, 1]])
    for i in range(2):
        scores = F.normalize(a[:, i], dim=-1) @ F.normalize(t[:, i], dim=-1).T
        assert scores.argmax(0).tolist() == scores.argmax(1).tolist() == [0, 1, 2, 3]


@torch.no_grad()
def test_all_layers_come_with_the_same_embedding(build):
    model = build().eval()
    audio, ids = noise(), encode_captions(model.tokenizer, CAPTIONS, 32)
    for tower, rows in ((model.audio, audio), (model.text, ids)):
        embedding, layers = tower(rows, return_all_layers=True)
        assert layers.shape == (tower.depth, 4, tower.dim)
        torch.testing.assert_close(embedding, tower(rows), rtol=0, atol=1e-12)
        torch.testing.assert_close(embedding, tower.norm(layers[-1]), rtol=0, atol=1e-12)


def test_bounds_hold_each_temperature(build):
    model = build().train()
    temperatures = model.multi_layer_contrastive_learning.contrast.temperatures
    with torch.no_grad():
        temperatures.copy_(torch.tensor([50.0, -50.0])[:, None, None])
    loss = model(noise(), CAPTIONS)
    loss.backward()
    assert torch.isfinite(loss)
    assert temperatures.grad.all()
    torch.testing.assert_close(temperatures.exp().flatten().tolist(), [100.0, 1.0])


@pytest.mark.parametrize("sigmoid", [False, True])
def test_state_dict_has_the_names_and_shapes_of_musiclm_pytorch(build, sigmoid):
    plain = build(hierarchical=False, sigmoid_contrastive_loss=sigmoid).state_dict()
    state = build(sigmoid_contrastive_loss=sigmoid).state_dict()
    wanted = {
        "audio_layers_indices": (2,),
        "text_layers_indices": (2,),
        PREFIX + "audio_gamma": (2, 1, 32),
        PREFIX + "audio_latent_weight": (2, 32, 24),
        PREFIX + "audio_latent_bias": (2, 1, 24),
        PREFIX + "text_gamma": (2, 1, 48),
        PREFIX + "text_latent_weight": (2, 48, 24),
        PREFIX + "text_latent_bias": (2, 1, 24),
        PREFIX + "contrast.temperatures": (2, 1, 1),
    }
    if sigmoid:
        wanted[PREFIX + "contrast.bias"] = (2, 1, 1)
    assert {key: tuple(state[key].shape) for key in state.keys() - plain.keys()} == wanted
    assert plain.keys() < state.keys()


def test_layers_are_spread_from_the_first_and_never_reach_the_last():
    assert spread_layers(5, 6).tolist() == [0, 1, 2, 3, 4]
    assert spread_layers(3, 12).tolist() == [0, 4, 8]
    assert spread_layers(4, 6).tolist() == [0, 1, 3, 4]
    for depth in range(2, 40):
        for num_layers in range(1, depth):
            indices = spread_layers(num_layers, depth).tolist()
            assert len(set(indices)) == num_layers and indices[-1] < depth - 1


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, 1])
def test_config_rebuilds_the_model(build, layers):
    model = build(layers).eval()
    config = json.loads(json.dumps(model.config))
    rebuilt = MuLaN.from_config(config).double().eval()
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(noise(), CAPTIONS), model(noise(), CAPTIONS))


@torch.no_grad()
def test_without_it_a_model_is_what_it_was(build):
    model = build(hierarchical=False).float().eval()
    config = model.config
    assert config.pop("hierarchical_contrastive_loss") is False
    assert config.pop("hierarchical_contrastive_loss_layers") is None
    assert MuLaN.from_config(config).config == model.config  # one saved before there was a choice
    assert not any("layers_indices" in key or PREFIX in key for key in model.state_dict())
    audio = noise(torch.float32)
    wanted = contrastive_loss(
        model.embed_audio(audio),
        model.embed_text(CAPTIONS),
        model.contrast.temperatures.exp().squeeze(),
        kind="decoupled",
    )
    assert torch.equal(model(audio, CAPTIONS), wanted)


def test_the_bundled_config_has_none_of_it():
    assets = Path(musiclm_engine.__file__).parent / "assets"
    config = json.loads((assets / "mulan.json").read_text())["config"]
    model = MuLaN.from_config(config)
    assert model.multi_layer_contrastive_learning is None


def test_refuses_layers_that_the_towers_do_not_have(build):
    for layers in (0, 3, -1):
        with pytest.raises(ValueError, match=f"hierarchical_contrastive_loss_layers={layers};"):
            build(layers)
    with pytest.raises(ValueError, match="text_transformer.depth=1"):
        build(text_depth=1)
    with pytest.raises(ValueError, match="audio_transformer.depth=1"):
        build(1, audio_depth=1)
    with pytest.raises(ValueError, match="layers=2 without hierarchical_contrastive_loss"):
        build(2, hierarchical=False)
