"""Facts of clips as axes of an embedding: what is taught, to whom, and how it is scored."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from musiclm_engine.data.manifest import Clip, ManifestError
from musiclm_engine.training.facts import LOGIT_SCALE, TEMPO_STEP, Facts, FactTargets

DIM = 64


def clip(stated: tuple[frozenset[str], ...] = (), **facts: object) -> Clip:
    captions = tuple(f"caption {n}" for n in range(max(1, len(stated))))
    return Clip(Path("a.flac"), 10.0, captions, "train", "piece", facts, stated)


CLIPS = [
    clip(instrument="flute", key="G", mode="major", tempo_bpm=100),
    clip(instrument="organ", key="C", mode="minor", tempo_bpm=50),
    clip(instrument="flute", key=None, mode=None, tempo_bpm=None),
]
NAMES = ("instrument", "key", "mode", "tempo_bpm")


@pytest.fixture
def facts() -> Facts:
    return Facts(NAMES, CLIPS, DIM, seed=0)


def test_axes_are_orthonormal_and_of_the_seed(facts: Facts) -> None:
    assert torch.allclose(facts.axes @ facts.axes.T, torch.eye(len(facts.axes)), atol=1e-5)
    assert torch.equal(facts.axes, Facts(NAMES, CLIPS, DIM, seed=0).axes)
    assert not torch.equal(facts.axes, Facts(NAMES, CLIPS, DIM, seed=1).axes)


def test_targets_are_distributions_where_a_fact_is_known(facts: Facts) -> None:
    targets = facts.targets(CLIPS)
    assert targets.known.tolist() == [[True] * 4, [True] * 4, [True, False, False, False]]
    for name, shares in zip(NAMES, targets.shares.split(facts.sizes, dim=1), strict=True):
        known = targets.known[:, NAMES.index(name)]
        torch.testing.assert_close(shares.sum(1), known.float())
    instrument = targets.shares[:, : facts.sizes[0]]
    assert facts.values["instrument"] == ["flute", "organ"]
    assert instrument.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_a_tempo_shares_with_its_neighbours_alone(facts: Facts) -> None:
    steps = facts.values["tempo_bpm"]
    assert steps[0] == 50
    assert steps[-1] >= 100
    ratios = [math.log(b / a) for a, b in pairwise(steps)]
    assert ratios == pytest.approx([TEMPO_STEP] * len(ratios))
    shares = facts.targets(CLIPS).shares[:, -len(steps) :]
    mean = (shares[0] * torch.tensor(steps)).sum()
    assert mean == pytest.approx(100, rel=TEMPO_STEP)
    assert shares[1].argmax() == 0
    far = torch.tensor(steps).log().sub(math.log(100)).abs() > 5 * TEMPO_STEP
    assert shares[0][far].sum() < 1e-3


def test_a_value_never_seen_in_training_is_unknown(facts: Facts) -> None:
    targets = facts.targets([clip(instrument="banjo", key="G", mode="major", tempo_bpm=80)])
    assert targets.known.tolist() == [[False, True, True, True]]


def test_captions_are_asked_for_what_they_state(facts: Facts) -> None:
    stated = (
        frozenset({"instrument", "key"}),  # a key is a tonic and a mode
        frozenset({"mode", "tempo_word"}),  # a word is no number
        frozenset({"tempo_bpm"}),
    )
    known = clip(stated, instrument="flute", key="G", mode="major", tempo_bpm=100)
    assert [facts.stated(known, n) for n in range(3)] == [
        [True, True, True, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_the_loss_is_cross_entropy_over_the_values_of_each_fact(facts: Facts) -> None:
    embeddings = torch.randn(3, DIM, dtype=torch.float64)
    embeddings /= embeddings.norm(dim=1, keepdim=True)
    targets = facts.targets(CLIPS)
    expected, first = [], 0
    for column, size in enumerate(facts.sizes):
        losses = []
        for row in range(3):
            if not targets.known[row, column]:
                continue
            axes = facts.axes[first : first + size].double()
            logits = LOGIT_SCALE * axes @ embeddings[row]
            shares = targets.shares[row, first : first + size].double()
            losses.append(logits.exp().sum().log() - (shares * logits).sum())
        expected.append(torch.stack(losses).mean())
        first += size
    loss = facts.loss(embeddings, targets)
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_what_is_not_stated_gives_no_gradient(facts: Facts) -> None:
    embeddings = torch.randn(3, DIM, requires_grad=True)
    targets = facts.targets(CLIPS)
    nothing = FactTargets(targets.shares, torch.zeros_like(targets.known))
    loss = facts.loss(embeddings, nothing)
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert not gradient.any()


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_a_gpu_is_not_waited_for(facts: Facts) -> None:
    embeddings, targets = torch.randn(3, DIM), facts.targets(CLIPS)
    with Calls() as calls:
        facts.loss(embeddings, targets)
    waits = {"aten.repeat_interleave.Tensor", "aten._local_scalar_dense.default"}
    assert "aten._log_softmax.default" in calls.names and not calls.names & waits


def test_they_lie_on_the_device_that_is_asked_for() -> None:
    on_meta = Facts(NAMES, CLIPS, DIM, seed=0, device=torch.device("meta"))
    targets = on_meta.targets(CLIPS)
    assert targets.shares.is_meta and targets.known.is_meta
    assert on_meta.loss(torch.empty(3, DIM, device="meta"), targets).is_meta


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("tempo_bpm", 0, "beats a minute, 10 to 1000"),
        ("tempo_bpm", True, "beats a minute, 10 to 1000"),
        ("tempo_bpm", 1e300, "beats a minute, 10 to 1000"),
        ("tempo_bpm", math.nan, "beats a minute, 10 to 1000"),
        ("tempo_bpm", "fast", "beats a minute, 10 to 1000"),
        ("mood", ["calm"], "a word or a number"),
    ],
)
def test_a_fact_of_another_form_is_refused(name: str, value: object, wanted: str) -> None:
    with pytest.raises(ManifestError, match=f"a.flac has the fact {name} = .*, wanted {wanted}"):
        Facts((name,), [clip(**{name: value})], DIM, seed=0)


def test_an_embedding_along_the_axes_hits_every_fact(facts: Facts) -> None:
    targets = facts.targets(CLIPS)
    hits = facts.hits(targets.shares @ facts.axes, targets)
    assert hits == {"instrument": (3, 3), "key": (2, 2), "mode": (2, 2), "tempo_bpm": (2, 2)}
    hits = facts.hits(-(targets.shares @ facts.axes), targets)
    assert hits["mode"] == (0, 2)


def test_a_fact_that_no_clip_has_is_refused() -> None:
    with pytest.raises(ManifestError, match="no clip has the fact colour"):
        Facts(("colour",), CLIPS, DIM, seed=0)


def test_more_values_than_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="values, wanted at most dim_latent 8"):
        Facts(NAMES, CLIPS, 8, seed=0)
