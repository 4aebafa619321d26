"""A stage with a clock chooses a tempo, and keeps it."""

import pytest
import torch

from musiclm_engine import MusicLM, SemanticTransformer
from musiclm_engine.audiolm.beat_clock import NUM_TEMPI, bpm_of
from musiclm_engine.generation import Sampling, derive_seeds
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.tempo import choose_tempo
from musiclm_engine.generation.windows import decode_overlapping

CONDITIONING = torch.tensor([[1, 2], [3, 4], [5, 6]])
SEEDS = derive_seeds(0, count=3)
NOTHING = torch.zeros(3, 0, 1, dtype=torch.int64)


def build(with_opinions, **changes):
    torch.manual_seed(0)
    options = {"frame_rate_hz": 25.0, "conditioning_length": 2, **changes}
    return with_opinions(
        SemanticTransformer(
            num_semantic_tokens=12, conditioning_size=8, dim=16, depth=2,
            heads=2, dim_head=8, max_frames=64, **options,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def stage(with_opinions):
    return build(with_opinions)


def choose(stage, rows=slice(None), prefix=NOTHING, **sampling):
    return choose_tempo(
        stage,
        conditioning=CONDITIONING[rows],
        prefix=prefix[rows],
        seeds=SEEDS[rows],
        sampling=Sampling(**sampling),
    )


def test_a_tempo_is_predicted_above_the_conditioning(stage):
    """As the token that follows it in the whole sequence, which nothing later reaches."""
    tempo, target = torch.tensor([5, 50, 90]), torch.zeros(3, 7, 1, dtype=torch.int64)
    q_codes, k_codes = stage.codes(0, 7, tempo)
    with torch.no_grad():
        hidden = stage.transformer(
            stage.embed(CONDITIONING, None, target, tempo),
            table=stage.position.table(),
            offset=stage.position.offset,
            q_codes=q_codes,
            k_codes=k_codes,
        )
        found = stage.tempo_logits(CONDITIONING)
    wanted = hidden[:, 1] @ stage.clock.logit_weights.T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_likeliest_tempo_is_the_mean_of_its_hill(stage, monkeypatch):
    p = torch.zeros(3, NUM_TEMPI)
    p[0, 10] = 1.0
    p[1, 40:43] = torch.tensor([0.4, 0.1, 0.3])  # 40.9
    p[1, 80] = 0.2
    p[2, 100], p[2, 103], p[2, 96] = 0.5, 0.3, 0.2  # 101.1; 96 is too far
    monkeypatch.setattr(stage, "tempo_logits", lambda conditioning: p.log())
    assert choose(stage, temperature=0.0).tolist() == [10, 41, 101]


def test_other_hills_are_drawn_as_often_as_they_are_high(stage, monkeypatch):
    """By their cubes: a third of the temperature."""
    p = torch.zeros(NUM_TEMPI)
    p[20], p[60] = 0.6, 0.4
    monkeypatch.setattr(stage, "tempo_logits", lambda conditioning: p.log().expand(400, -1))
    drawn = choose_tempo(
        stage,
        conditioning=CONDITIONING[:1].expand(400, -1),
        prefix=NOTHING[:1].expand(400, 0, 1),
        seeds=derive_seeds(0, count=400),
        sampling=Sampling(),
    )
    share = (drawn == 20).float().mean()
    assert set(drawn.tolist()) == {20, 60} and abs(share - 0.6**3 / (0.6**3 + 0.4**3)) < 0.06


def test_tempi_are_drawn_by_row(stage):
    together = choose(stage)
    assert len(together.unique()) > 1
    for row in range(3):
        assert torch.equal(choose(stage, rows=slice(row, row + 1)), together[row : row + 1])


def test_given_frames_tell_the_tempo(stage):
    frames = torch.randint(12, (3, 9, 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        total = stage.tempo_logits(CONDITIONING).log_softmax(-1)
        for tempo in range(NUM_TEMPI):
            logits = stage(CONDITIONING, None, frames, torch.full((3,), tempo))
            total[:, tempo] += logits.log_softmax(-1).gather(-1, frames[..., None]).sum((1, 2, 3))
    assert torch.equal(choose(stage, prefix=frames), total.argmax(-1))


def test_all_windows_are_at_one_tempo(stage, monkeypatch):
    from musiclm_engine.generation import windows

    tempi = []

    def watch(stage, **arguments):
        tempi.append(arguments["tempo"])
        return decode_stage(stage, **arguments)

    monkeypatch.setattr(windows, "decode_stage", watch)
    draw = {"conditioning": CONDITIONING, "seeds": SEEDS, "sampling": Sampling(guidance=2.0)}
    tokens = decode_overlapping(stage, context=None, frames=20, window=8, **draw)
    assert tokens.shape == (3, 20, 1) and len(tempi) == 4
    assert all(torch.equal(tempo, choose(stage)) for tempo in tempi)


def test_the_tempo_shows_in_what_is_drawn(stage):
    def draw(tempo):
        return decode_stage(
            stage, conditioning=CONDITIONING, context=None, prefix=NOTHING, frames=30,
            seeds=SEEDS, sampling=Sampling(), tempo=tempo,
        )  # fmt: skip

    slow = torch.zeros(3, dtype=torch.int64)
    assert not torch.equal(draw(slow), draw(slow + 100))
    assert torch.equal(draw(None), draw(choose(stage)))


def test_any_precision_has_a_tempo(stage):
    for dtype in (torch.float64, torch.bfloat16):
        other = SemanticTransformer.from_config(stage.config)
        other.load_state_dict(stage.state_dict())
        tokens = decode_stage(
            other.to(dtype).eval(), conditioning=CONDITIONING, context=None, prefix=NOTHING,
            frames=5, seeds=SEEDS, sampling=Sampling(guidance=2.0),
        )  # fmt: skip
        assert tokens.shape == (3, 5, 1)


def test_a_stage_without_a_clock_has_no_tempo(with_opinions):
    plain = build(with_opinions, frame_rate_hz=None)
    assert choose(plain) is None
    with pytest.raises(ValueError, match="tempo is given, this stage has no clock"):
        plain(CONDITIONING, None, NOTHING, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="this stage has no clock"):
        plain.tempo_logits(CONDITIONING)
    with pytest.raises(ValueError, match="conditioning_length is 0, wanted conditioning"):
        build(with_opinions, conditioning_length=0)


def test_tempi_of_another_form_are_refused(stage):
    with pytest.raises(ValueError, match="tempo is missing, this stage has a clock"):
        stage(CONDITIONING, None, NOTHING)
    with pytest.raises(ValueError, match=r"tempo is \(2,\), wanted \[3\]"):
        stage(CONDITIONING, None, NOTHING, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="tempo spans 0 to 104, wanted 0 to 103"):
        stage(CONDITIONING, None, NOTHING, torch.tensor([0, 1, NUM_TEMPI]))
    with pytest.raises(ValueError, match=r"conditioning is \(3, 1\), wanted \[3, 2\]"):
        choose_tempo(
            stage, conditioning=CONDITIONING[:, :1], prefix=NOTHING, seeds=SEEDS,
            sampling=Sampling(),
        )  # fmt: skip


def test_the_bundled_model_takes_the_tempo_it_is_told():
    model = MusicLM.from_pretrained()
    wanted = torch.tensor([63.0, 72.0, 84.0, 96.0, 108.0, 120.0])
    prompts = [f"a tune on a flute in D major at {bpm:.0f} bpm" for bpm in wanted]
    conditioning = model.quantizer.encode(model.mulan.embed_text(prompts))
    stage = model.audiolm.semantic
    tempo = choose_tempo(
        stage,
        conditioning=conditioning,
        prefix=torch.zeros(6, 0, 1, dtype=torch.int64),
        seeds=derive_seeds(0, count=6),
        sampling=Sampling(temperature=0.0, guidance=3.0),
    )
    off = (bpm_of(tempo) / wanted).log2()
    octaves = (off - off.round()).abs()
    assert octaves.median() < 0.06 and octaves.max() < 0.15
