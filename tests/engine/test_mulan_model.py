import json
import math

import pytest
import torch

from musiclm_engine.mulan import (
    AudioSpectrogramTransformer,
    MuLaN,
    TextTransformer,
    train_caption_tokenizer,
)

SECOND = 16000
CAPTIONS = ["a slow hymn on an organ", "a fast reel on a fiddle", "drums alone", "a solo flute"]


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are small: on a busy machine two threads wait for each other (70 s, not 1)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def tokenizer():
    return train_caption_tokenizer(CAPTIONS, 300)


@pytest.fixture
def build(tokenizer):
    def build(depth: int = 1, **arguments) -> MuLaN:
        torch.manual_seed(0)
        tower = {"dim_head": 16, "heads": 2}
        return MuLaN(
            # Narrow masks: wide ones would hide the pure tones that it learns to tell apart.
            AudioSpectrogramTransformer(32, depth, num_mels=64, spec_aug_freq_mask=8, **tower),
            TextTransformer(48, depth, num_tokens=300, max_seq_len=32, **tower),
            tokenizer=tokenizer,
            **arguments,
        )

    return build


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tones(num_samples: int = SECOND) -> torch.Tensor:
    frequencies_hz = torch.tensor([200.0, 500.0, 1200.0, 3000.0])
    return torch.sin(2 * math.pi * frequencies_hz[:, None] * torch.arange(num_samples) / SECOND)


def test_embeddings_are_unit_vectors_of_one_space(build):
    model = build().eval()
    audio, text = model.embed_audio(noise(3, SECOND)), model.embed_text(CAPTIONS)
    assert audio.shape == (3, 128) and text.shape == (4, 128)
    torch.testing.assert_close(audio.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(model.similarity(noise(3, SECOND), CAPTIONS), audio @ text.T)


@pytest.mark.parametrize("kind", ["softmax", "decoupled", "sigmoid"])
def test_loss_is_that_of_its_formula(build, kind):
    model = build(
        decoupled_contrastive_learning=kind == "decoupled",
        sigmoid_contrastive_loss=kind == "sigmoid",
    ).eval()
    audio = noise(4, SECOND)
    logits = 10 * model.similarity(audio, CAPTIONS).double()
    diagonal = torch.eye(4, dtype=torch.bool)
    if kind == "sigmoid":
        signs = torch.where(diagonal, 1.0, -1.0)
        wanted = torch.log1p(torch.exp(-signs * (logits - 10))).sum() / 4
    else:
        others = logits.masked_fill(diagonal, -math.inf) if kind == "decoupled" else logits
        wanted = -logits.diag().mean()
        wanted = wanted + 0.5 * (others.logsumexp(0) + others.logsumexp(1)).mean()
    loss = model(audio, CAPTIONS)
    assert loss.shape == ()
    torch.testing.assert_close(loss, wanted.float(), atol=1e-4, rtol=1e-4)


def test_loss_at_the_start_is_log_batch(build):
    model = build(decoupled_contrastive_learning=False)
    texts = [f"{caption} number {i}" for i in range(4) for caption in CAPTIONS]
    assert abs(model(noise(16, SECOND), texts).item() - math.log(16)) < 0.5


@pytest.mark.parametrize("sigmoid", [False, True])
def test_it_learns_four_pairs(build, sigmoid):
    model = build(sigmoid_contrastive_loss=sigmoid)
    audio = tones()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(audio, CAPTIONS).backward()
        optimizer.step()
    similarity = model.eval().similarity(audio, CAPTIONS)
    assert similarity.argmax(1).tolist() == similarity.argmax(0).tolist() == [0, 1, 2, 3]
    others = similarity.masked_fill(torch.eye(4, dtype=torch.bool), -1).amax(1)
    assert (similarity.diag() - others).min() > 0.2


def test_every_parameter_gets_a_gradient(build):
    model = build(depth=2, sigmoid_contrastive_loss=True)
    model(noise(4, SECOND), CAPTIONS).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_temperature_stays_in_its_bounds_and_can_come_back(build):
    model = build()
    assert abs(model.temperature - 10) < 1e-4
    for value, bound in ((50.0, 100), (-50.0, 1)):
        with torch.no_grad():
            model.contrast.temperatures.fill_(value)
        assert abs(model.eval().temperature - bound) < 1e-3
        model.zero_grad()
        loss = model.train()(noise(4, SECOND), CAPTIONS)
        loss.backward()
        assert torch.isfinite(loss)
        assert model.contrast.temperatures.grad.abs().item() > 0


@torch.no_grad()
def test_long_audio_is_the_mean_of_its_windows(build):
    model = build(window_seconds=1.0, stride_seconds=0.5).eval()
    audio = noise(2, int(2.3 * SECOND))
    windows = [model.embed_audio(audio[:, s : s + SECOND]) for s in (0, 8000, 16000)]
    mean = torch.nn.functional.normalize(torch.stack(windows).mean(0), dim=-1)
    torch.testing.assert_close(model.embed_audio(audio), mean, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [100, 12000, 16000, 30000])
def test_a_clip_in_a_batch_of_longer_ones_embeds_as_alone(build, length):
    model = build(window_seconds=1.0, stride_seconds=0.5).eval()
    audio = noise(3, 40 * SECOND)  # more windows than one pass takes
    lengths = torch.tensor([length, 40 * SECOND, 17000])
    embedded = model.embed_audio(audio, lengths)
    alone = model.embed_audio(audio[:1, :length])
    torch.testing.assert_close(embedded[:1], alone, atol=1e-5, rtol=1e-5)


def test_lengths_are_heard_in_training_too(build):
    model = build().eval()
    audio, lengths = noise(4, SECOND), torch.tensor([SECOND, 5000, SECOND, 9000])
    other = audio.clone()
    other[1, 5000:] = 1.0
    loss, same = (model(x, CAPTIONS, lengths=lengths) for x in (audio, other))
    torch.testing.assert_close(loss, same)
    assert not torch.allclose(model(audio, CAPTIONS), model(other, CAPTIONS))


@torch.no_grad()
def test_config_rebuilds_the_model(build):
    model = build(depth=2, window_seconds=2.0, sigmoid_contrastive_loss=True).eval()
    config = json.loads(json.dumps(model.config))
    rebuilt = MuLaN.from_config(config).eval()
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    audio = noise(2, 3 * SECOND)
    assert torch.equal(rebuilt.similarity(audio, CAPTIONS), model.similarity(audio, CAPTIONS))
    MuLaN.from_config(config)  # reading a config does not use it up


def test_state_dict_keys_are_those_of_musiclm_pytorch(build):
    keys = build(sigmoid_contrastive_loss=True).state_dict().keys()
    for key in (
        "audio.to_patch_tokens.1.weight",
        "audio.to_patch_tokens.2.bias",
        "audio.to_patch_tokens.3.weight",
        "audio.dynamic_pos_bias_mlp.4.weight",
        "audio.transformer.layers.0.0.to_kv.weight",
        "audio.transformer.layers.0.0.q_scale",
        "audio.transformer.layers.0.0.to_out.0.weight",
        "audio.transformer.layers.0.1.0.learned_gamma",
        "audio.transformer.layers.0.1.4.weight",
        "audio.norm.learned_gamma",
        "text.cls_token",
        "text.token_emb.weight",
        "text.pos_emb.weight",
        "text_to_latents.bias",
        "audio_to_latents.weight",
        "contrast.temperatures",
        "contrast.bias",
    ):
        assert key in keys


def test_refuses_bad_pairs(build):
    model = build()
    with pytest.raises(ValueError, match="2 texts"):
        model(noise(4, SECOND), CAPTIONS[:2])
    with pytest.raises(ValueError, match="B >= 2"):
        model(noise(1, SECOND), CAPTIONS[:1])
    with pytest.raises(ValueError, match=r"texts\[1\]"):
        model.embed_text(["drums", ""])
    with pytest.raises(ValueError, match="list of str"):
        model.embed_text("drums")
    with pytest.raises(ValueError, match="lengths"):
        model.embed_audio(noise(1, 20 * SECOND), torch.tensor([21 * SECOND]))
    with pytest.raises(ValueError, match="audio"):
        model.embed_audio(noise(SECOND))


def test_refuses_towers_that_do_not_fit(tokenizer):
    audio = AudioSpectrogramTransformer(32, 1)
    with pytest.raises(ValueError, match="num_tokens=100"):
        MuLaN(audio, TextTransformer(32, 1, num_tokens=100), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="pad_id=1"):
        MuLaN(audio, TextTransformer(32, 1, num_tokens=400, pad_id=1), tokenizer=tokenizer)
    text = TextTransformer(32, 1, num_tokens=400)
    with pytest.raises(ValueError, match="stride_seconds=0"):
        MuLaN(audio, text, tokenizer=tokenizer, stride_seconds=0)
