"""BEST-RQ: frozen random labels, masked spans, and a loss on what is masked."""

import math

import pytest
import torch
from torch.nn import functional as F

from musiclm_engine.audiolm import best_rq
from musiclm_engine.audiolm.best_rq import BestRQTokenizer, RandomProjectionLabels, span_mask
from musiclm_engine.checkpoint import load_model, save_model

SMALL = {
    "num_tokens": 6,
    "num_components": 4,
    "dim": 16,
    "depth": 2,
    "heads": 2,
    "feature_layer": 1,
    "label_dim": 4,
    "label_size": 8,
    "mask_probability": 0.1,
    "mask_span": 3,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BestRQTokenizer(**SMALL)


def frames(batch=2, length=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, 334, generator=generator)


def test_labels_are_the_nearest_unit_vectors():
    labels = RandomProjectionLabels(10, dim=3, codebook_size=7, seed=0)
    x = torch.randn(4, 5, 10, generator=torch.Generator().manual_seed(0))
    projected = F.normalize(x.double() @ labels.projection.double(), dim=-1)
    distance = (projected[..., None, :] - labels.codebook.double()).square().sum(-1)
    assert torch.equal(labels(x), distance.argmin(-1))
    assert torch.equal(labels(7 * x), labels(x))


def test_labels_depend_on_the_seed_alone_and_are_not_trained(model):
    torch.manual_seed(99)
    again = BestRQTokenizer(**SMALL)
    other = BestRQTokenizer(**SMALL | {"label_seed": 1})
    assert torch.equal(model.labels(frames()), again.labels(frames()))
    assert not torch.equal(model.labels(frames()), other.labels(frames()))
    assert not list(model.labels.parameters())
    before = {name: value.clone() for name, value in model.labels.state_dict().items()}
    step(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    assert all(torch.equal(model.labels.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(("probability", "span"), [(0.04, 10), (0.3, 1), (0.0, 4), (1.0, 2)])
def test_the_share_that_is_masked(probability, span):
    torch.manual_seed(0)
    mask = span_mask(40, 1000, probability=probability, span=span, device=torch.device("cpu"))
    share = mask[:, span:].float().mean().item()
    assert share == pytest.approx(1 - (1 - probability) ** span, abs=0.02)


def test_a_span_begins_where_it_was_drawn():
    """So a first frame is masked by its own draw alone, and later ones by those before too."""
    torch.manual_seed(0)
    mask = span_mask(5000, 6, probability=0.1, span=4, device=torch.device("cpu"))
    expected = torch.tensor([1 - 0.9 ** min(t + 1, 4) for t in range(6)])
    torch.testing.assert_close(mask.float().mean(0), expected, rtol=0, atol=0.02)


def test_spans_are_whole():
    torch.manual_seed(0)
    mask = span_mask(1, 2000, probability=0.02, span=5, device=torch.device("cpu"))[0]
    text = "".join("x" if masked else " " for masked in mask[:-5])
    assert text.strip() and min(len(run) for run in text.strip().split()) >= 5


def test_only_masked_frames_count(model, monkeypatch):
    """Against the definition in float64, from the encoder's own output."""
    x, mask = frames(), torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 3:7], mask[1, 15:] = True, True
    monkeypatch.setattr(best_rq, "span_mask", lambda *shape, **_: mask)
    torch.manual_seed(5)
    losses = model.loss_of(x)
    torch.manual_seed(5)
    seen = torch.where(mask[..., None], 0.1 * torch.randn_like(x), x)
    logits = model.to_labels(model.norm(model._hidden(seen, 2)))
    log_p = logits.double().log_softmax(-1)
    labels = model.labels(x)
    of_masked = [-log_p[b, t, labels[b, t]] for b in range(2) for t in range(20) if mask[b, t]]
    assert len(of_masked) == 9
    torch.testing.assert_close(losses["loss"].double(), torch.stack(of_masked).mean())
    assert losses["masked"] == pytest.approx(9 / 40)


def test_what_is_masked_is_not_seen(model, monkeypatch):
    """Louder frames have the same labels: behind the mask they must change nothing."""
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 5:9] = True
    monkeypatch.setattr(best_rq, "span_mask", lambda *shape, **_: mask)
    losses = []
    for where in (None, mask, ~mask):
        x = frames() if where is None else torch.where(where[..., None], 2 * frames(), frames())
        torch.manual_seed(5)
        losses.append(model.loss_of(x)["loss"].item())
    assert losses[1] == losses[0] != losses[2]


def test_nothing_masked_costs_nothing(model):
    model.mask_probability = 0.0
    assert model.loss_of(frames())["loss"] == 0


def test_a_frame_sees_later_and_earlier_ones(model):
    x = frames()
    for changed, seen_at in ((19, 0), (0, 19)):
        y = x.clone()
        y[:, changed] += 1
        assert not torch.equal(model.features_of(x)[:, seen_at], model.features_of(y)[:, seen_at])


def test_a_row_alone_is_the_row_in_a_batch(model):
    x = frames(batch=3)
    torch.testing.assert_close(model.features_of(x)[1:2], model.features_of(x[1:2]))


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    # Two kinds of stretches, so that what is masked can be told from what is around it.
    x = frames(batch=2, length=1).expand(-1, 24, -1).clone()
    loss = model.loss_of(x)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_short_training_lowers_the_loss(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = [step(model, optimizer, seed) for seed in range(30)]
    assert losses[0] > 0.5 * math.log(8)
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_audio_to_tokens_and_through_a_file(model, tones, tmp_path):
    audio = torch.stack([tones(1.0, hz) for hz in (220.0, 440.0)])
    model.standardise(audio)
    model.eval().fit(model.features(audio).flatten(0, 1), seed=0)
    tokens = model.encode(audio)
    assert tokens.shape == (2, 25) and tokens.max() < 6
    assert not torch.equal(tokens[0], tokens[1])
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model", {"BestRQTokenizer": BestRQTokenizer})
    assert torch.equal(again.encode(audio), tokens)
    assert model.loss(audio)["loss"].isfinite()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"feature_layer": 3}, "feature_layer is 3, wanted 1 to depth = 2"),
        ({"feature_layer": 0}, "feature_layer is 0"),
        ({"heads": 3}, "heads is 3, wanted a divisor of dim = 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BestRQTokenizer(**SMALL | wrong)
