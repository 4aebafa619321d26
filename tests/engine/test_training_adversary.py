"""A model and its adversary: who learns from what, what is kept, and a codec trained that way."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from musiclm_engine.checkpoint import CheckpointError, read_tensors
from musiclm_engine.codec import SoundStream
from musiclm_engine.codec.discriminators import WaveformDiscriminators
from musiclm_engine.components import load_component
from musiclm_engine.training.codec_recipe import AdversarySettings
from musiclm_engine.training.config import ConfigError, load_config, table
from musiclm_engine.training.learner import Learner, descend
from musiclm_engine.training.loop import Adversary, Recipe, fit
from musiclm_engine.training.run import train
from musiclm_engine.training.schedule import Schedule

CPU = torch.device("cpu")
SCHEDULE = Schedule(steps=10, learning_rate=1e-2, warmup=2, validate_every=5)
EVERY_STEP = Schedule(**{**vars(SCHEDULE), "save_every_seconds": 0.0})


class Forger(nn.Module):
    """Makes numbers that should pass for its target's; dropout, so that seeds matter."""

    def __init__(self):
        super().__init__()
        self.config = {}
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        return self.layers(x)


def recipe(*, after=3, opposed=True, broken=lambda step, loss: loss):
    torch.manual_seed(0)
    forger, judge = Forger(), nn.Sequential(nn.Linear(2, 8), nn.ELU(), nn.Linear(8, 1))

    def losses(step):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        forged = forger(x)
        own = (forged.mean(0) - x[:, :2].mean(0)).square().sum()
        if not opposed or step < after:
            return {"loss": own, "own": own}
        verdict = judge(forged)
        return {
            "loss": own - verdict.mean(),
            "own": own,
            "adversary_loss": broken(step, F.relu(1 - judge(x[:, :2])).mean())
            + F.relu(1 + verdict).mean(),
        }

    adversary = Adversary(judge, rate=0.5) if opposed else None
    return Recipe(forger, losses, dict, adversary)


def run(folder, steps=None, schedule=SCHEDULE, **arguments):
    return list(
        itertools.islice(fit(recipe(**arguments), schedule, folder, seed=0, device=CPU), steps)
    )


def checkpoint(folder):
    """All tensors but the time it took."""
    tensors = read_tensors(folder / "checkpoint.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name != "seconds"}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


# The loop.


@pytest.mark.parametrize("stop", [2, 3, 4, 7])
def test_resumed_is_uninterrupted(tmp_path, stop):
    """Stopped before the adversary comes in, just then, and after."""
    whole = run(tmp_path / "whole")
    first, rest = run(tmp_path / "parts", stop, EVERY_STEP), run(tmp_path / "parts")
    assert [figures for _, figures in first + rest] == [figures for _, figures in whole]
    assert same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


def test_each_descends_its_own_loss_from_where_both_stood(tmp_path):
    """One step of each by hand, with gradients of its own weights alone."""
    schedule = Schedule(steps=1, learning_rate=1e-2, warmup=0, clip=1e9)
    ours = recipe(after=0)
    assert ours.adversary is not None
    modules = ours.model, ours.adversary.model
    expected = []
    for module, name, rate, betas in zip(
        modules,
        ("loss", "adversary_loss"),
        (1e-2, 5e-3),
        ((0.9, 0.95), (0.5, 0.9)),
        strict=True,
    ):
        torch.manual_seed(0)
        loss = ours.losses(0)[name]
        trained = [p for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        again = copy.deepcopy(module)
        by_hand = [p for p in again.parameters() if p.requires_grad]
        for weight, gradient in zip(by_hand, gradients, strict=True):
            weight.grad = gradient
        groups = [
            {"params": [p for p in by_hand if (p.dim() >= 2) == decays], "weight_decay": decay}
            for decays, decay in ((True, schedule.weight_decay), (False, 0.0))
        ]
        torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True).step()
        expected.append(again.state_dict())
    assert len(list(fit(ours, schedule, tmp_path, seed=0, device=CPU))) == 1
    for module, weights in zip(modules, expected, strict=True):
        torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=1e-7)
    assert (ours.model.frozen == 1).all() and (ours.model.unused == 1).all()


def test_the_model_is_passed_once():
    """What torch.compile makes of it frees its buffers as it goes, and refuses to keep them."""
    ours = recipe(after=0)
    assert ours.adversary is not None
    losses = ours.losses(0)
    learners = [
        Learner(ours.model, SCHEDULE),
        Learner(ours.adversary.model, SCHEDULE, prefix="adversary_"),
    ]
    descend(learners, losses, rate=1e-2, clip=1.0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        losses["own"].backward()


def test_an_adversary_that_never_comes_in_changes_nothing(tmp_path):
    alone, waiting = run(tmp_path / "alone", opposed=False), run(tmp_path / "waiting", after=99)
    assert alone == waiting
    stored = checkpoint(tmp_path / "waiting")
    before = recipe().adversary.model.state_dict()
    assert {name for name in stored if name.startswith("adversary_optimizer/")} == set()
    assert same(
        before, {n.partition("/")[2]: x for n, x in stored.items() if n.startswith("adversary_")}
    )
    assert same(
        checkpoint(tmp_path / "alone"),
        {name: x for name, x in stored.items() if not name.startswith("adversary_")},
    )


def test_figures_tell_of_both(tmp_path):
    told = run(tmp_path)
    figures = {"train/progress", "train/loss", "train/own", "train/gradient_norm"}
    assert told[2][1].keys() == figures
    assert told[3][1].keys() == figures | {"train/adversary_loss", "train/adversary_gradient_norm"}


def test_the_saved_model_is_the_model_alone(tmp_path):
    run(tmp_path)
    assert read_tensors(tmp_path / "model.safetensors").keys() == Forger().state_dict().keys()


def test_an_adversary_may_come_in_later_but_not_leave(tmp_path):
    run(tmp_path, 4, EVERY_STEP, opposed=False)
    told = run(tmp_path, 2, EVERY_STEP)
    assert [done for done, _ in told] == [5, 6] and "train/adversary_loss" in told[0][1]
    before = checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="another model .* adversary_model"):
        run(tmp_path, opposed=False)
    assert same(checkpoint(tmp_path), before)


@pytest.mark.parametrize("what, spoil", [
    ("adversary_loss", lambda step, loss: loss * math.nan),
    ("adversary_gradient", lambda step, loss: (loss * 0).sqrt()),
])  # fmt: skip
def test_an_adversary_that_diverges_stops_and_keeps_the_checkpoint(tmp_path, what, spoil):
    run(tmp_path, 5, EVERY_STEP)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(FloatingPointError, match=f"the {what} of step 5 is nan"):
        run(tmp_path, schedule=EVERY_STEP, broken=spoil)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


# A codec.

CODECS = {
    "spectrum": """
model = { dim = 16, encoder_depth = 1, decoder_depth = 1, codebook_dim = 8, codebook_size = 16, \
rq_num_quantizers = 3, phase_iterations = 2 }
[codec.adversary]
model = { channels = 4 }
""",
    "waveform": """
model = { channels = 2, strides = [4, 8], codebook_dim = 8, codebook_size = 16, \
rq_num_quantizers = 3 }
[codec.adversary]
model = { channels = 4, max_channels = 16, stft_channels = 2 }
""",
}


def write_config(folder, domain, *, steps=4, extra="after = 2", precision="fp32"):
    path = folder / f"{domain}.toml"
    path.write_text(f"""
seed = 3
[codec]
domain = "{domain}"
steps = {steps}
batch_size = 2
crop_seconds = 0.32
save_every_seconds = 0.0
precision = "{precision}"
{CODECS[domain]}{extra}
""")
    return path


def train_codec(config, manifest, run_dir, **arguments):
    told = []
    train(
        "codec",
        config=str(config),
        manifest=manifest,
        run_dir=run_dir,
        device=CPU,
        report=lambda what, done, total, figures: told.append((what, figures)),
        **arguments,
    )
    return [figures for what, figures in told if what == "codec"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("domain", CODECS)
def test_a_codec_is_trained_against_discriminators(domain, tmp_path, tiny_corpus):
    config = write_config(tmp_path, domain)
    told = train_codec(config, tiny_corpus, tmp_path / "whole")
    adversarial = {"reconstruction", "adversarial", "features", "adversary_loss"}
    own, opposed = told[1], told[2]
    assert opposed.keys() - own.keys() == {
        f"train/{name}" for name in adversarial | {"adversary_gradient_norm"}
    }
    weight = {"spectrum": 10, "waveform": 100}[domain]
    assert opposed["train/loss"] == pytest.approx(
        opposed["train/reconstruction"]
        + opposed["train/adversarial"]
        + weight * opposed["train/features"],
        rel=1e-5,
    )
    assert opposed["train/adversary_loss"] == pytest.approx(2, abs=0.3)  # it knows nothing yet
    assert opposed["train/adversary_gradient_norm"] > 0
    codec = load_component("codec", tmp_path / "whole" / "codec" / "model")
    assert not any("waves" in name or "painted" in name for name in codec.state_dict())

    def interrupt(what, done, total, figures):
        if what == "codec" and done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(
            "codec",
            config=str(config),
            manifest=tiny_corpus,
            run_dir=tmp_path / "parts",
            device=CPU,
            report=interrupt,
        )
    rest = train_codec(config, tiny_corpus, tmp_path / "parts")
    assert len(rest) == 1
    assert same(checkpoint(tmp_path / "whole" / "codec"), checkpoint(tmp_path / "parts" / "codec"))


@pytest.mark.parametrize("domain", CODECS)
def test_bfloat16_trains_both(domain, tmp_path, tiny_corpus):
    config = write_config(tmp_path, domain, steps=2, extra="", precision="bf16")
    told = train_codec(config, tiny_corpus, tmp_path / "run")
    assert all(math.isfinite(figure) for figures in told for figure in figures.values())
    held = checkpoint(tmp_path / "run" / "codec")
    assert {x.dtype for name, x in held.items() if "model/" in name} <= {
        torch.float32, torch.int64, torch.bool
    }  # fmt: skip


@pytest.mark.parametrize(
    "extra, error, message",
    [
        ("after = -1", ValueError, "after is -1, wanted a whole number of steps"),
        ("rate = inf", ValueError, "rate is inf, wanted a number from 0 up"),
        ("featurs = 1", ConfigError, r"\[codec\] of .* does not fit .*featurs"),
        ("[codec.adversary.model2]", ConfigError, "does not fit .*model2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, tiny_corpus, extra, error, message):
    config = write_config(tmp_path, "spectrum", extra=extra)
    with pytest.raises(error, match=message):
        train_codec(config, tiny_corpus, tmp_path / "run")
    assert not (tmp_path / "run" / "codec" / "model.json").exists()


def test_an_adversary_that_is_no_table_is_refused(tmp_path, tiny_corpus):
    config = write_config(tmp_path, "spectrum", extra="")
    config.write_text(config.read_text().split("[codec.adversary]")[0] + "adversary = 3\n")
    with pytest.raises(ConfigError, match=r"adversary = 3, wanted a table \[codec.adversary\]"):
        train_codec(config, tiny_corpus, tmp_path / "run")


def test_the_bundled_soundstream_is_that_of_the_paper_with_half_its_channels():
    settings = table(load_config("soundstream"), "codec")
    codec = SoundStream(**settings["model"])
    assert (codec.frame_rate_hz, codec.num_quantizers, codec.codebook_size) == (50, 8, 1024)
    assert 2.4e6 < sum(p.numel() for p in codec.parameters()) < 2.5e6
    against = AdversarySettings(**settings["adversary"])
    assert (against.adversarial, against.features, against.reconstruction) == (1, 100, 1)
    assert against.after < settings["steps"]
    WaveformDiscriminators(**against.model)
