"""Captions tell a tempo, and a stage that counts beats keeps it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from musiclm_engine import MusicLM, SemanticTransformer, TextTransformer
from musiclm_engine.audiolm.beat_clock import NUM_TEMPI, bpm_of, tempo_tokens
from musiclm_engine.checkpoint import CheckpointError, load_model, save_model
from musiclm_engine.data.manifest import load_manifest
from musiclm_engine.evaluation.clip_tokens import clips_to_continue
from musiclm_engine.generation import Sampling, derive_seeds
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.windows import decode_overlapping
from musiclm_engine.mulan import train_caption_tokenizer
from musiclm_engine.musiclm import fingerprint
from musiclm_engine.output import Request, write_outputs
from musiclm_engine.tempo_reader import TempoReader

CONDITIONING = torch.tensor([[1, 2], [3, 4], [5, 6]])
SEEDS = derive_seeds(0, count=3)
NOTHING = torch.zeros(3, 0, 1, dtype=torch.int64)
TEMPI = torch.tensor([10, 50, 90])
WORDS = ("a reel at {} bpm", "at {} beats per minute: a hymn", "{} bpm, a slow air on a flute")


def build_reader(captions, dim=16, **options):
    torch.manual_seed(0)
    tokenizer = train_caption_tokenizer(captions, 280, splits_digits=True)
    text = TextTransformer(dim, 1, num_tokens=tokenizer.get_vocab_size(), heads=1, **options)
    return TempoReader(text, tokenizer=tokenizer).eval()


@pytest.fixture(scope="module")
def reader():
    return build_reader([words.format(90) for words in WORDS])


def says(reader, monkeypatch, p):
    """The reader, of whatever words, says p."""
    monkeypatch.setattr(reader, "forward", lambda captions: p.log().expand(len(captions), -1))


# What it reads.


def test_it_learns_to_read_numbers():
    """In words that it has not seen them in."""
    pairs = [(words.format(n), n) for words in WORDS for n in range(60, 200)]
    known = [pair for number, pair in enumerate(pairs) if number % 3]
    held_out = [pair for number, pair in enumerate(pairs) if number % 3 == 0]
    reader = build_reader([caption for caption, _ in known], dim=64)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    random = np.random.default_rng(0)
    for _ in range(150):
        captions, bpm = zip(*(known[n] for n in random.integers(len(known), size=64)), strict=True)
        loss = F.cross_entropy(reader(captions), tempo_tokens(torch.tensor(bpm)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    captions, bpm = zip(*held_out, strict=True)
    found = reader.choose(captions, derive_seeds(0, count=len(captions)))
    near = (found - tempo_tokens(torch.tensor(bpm))).abs() <= 2  # 3.5 %
    assert near.float().mean() >= 0.9


def test_a_digit_is_a_token():
    captions = ["at 112 bpm"] * 50 + ["112"] * 50

    def numbers(**options):
        tokenizer = train_caption_tokenizer(captions, 400, **options)
        pieces = [piece.strip("Ġ") for piece in tokenizer.encode("112 bpm, 1120").tokens]
        return [piece for piece in pieces if piece.isdigit()]

    assert numbers(splits_digits=True) == list("1121120")
    assert numbers() == ["112", "112", "0"]  # MuLaN's, as it was measured


def test_the_hill_that_is_drawn_gives_its_mean(reader, monkeypatch):
    for hill, wanted in (
        ({10: 1.0}, 10),
        ({40: 0.5, 41: 0.1, 42: 0.4}, 41),
        ({100: 0.5, 103: 0.5}, 102),  # 101.5, to the even one
        ({0: 1.0}, 0),
        ({NUM_TEMPI - 1: 1.0}, NUM_TEMPI - 1),
    ):
        p = torch.zeros(NUM_TEMPI)
        p[list(hill)] = torch.tensor(list(hill.values()))
        says(reader, monkeypatch, p)
        assert reader.choose(["x"] * 3, SEEDS).tolist() == [wanted] * 3


def test_what_is_not_near_does_not_count(reader, monkeypatch):
    p = torch.zeros(NUM_TEMPI)
    p[50], p[54] = 0.6, 0.4  # together 51.6
    says(reader, monkeypatch, p)
    assert set(reader.choose(["x"] * 40, derive_seeds(0, count=40)).tolist()) == {50, 54}


def test_hills_are_drawn_by_the_cubes_of_their_heights(reader, monkeypatch):
    p = torch.zeros(NUM_TEMPI)
    p[20], p[60] = 0.6, 0.4
    says(reader, monkeypatch, p)
    drawn = reader.choose(["x"] * 400, derive_seeds(0, count=400))
    share = (drawn == 20).float().mean()
    assert set(drawn.tolist()) == {20, 60} and abs(share - 0.6**3 / (0.6**3 + 0.4**3)) < 0.06
    coldest = reader.choose(["x"] * 400, derive_seeds(0, count=400), temperature=0.0)
    assert (coldest == 20).all()


def test_a_row_is_read_as_it_is_alone(reader):
    captions = ["a reel", "a much longer description of a hymn at 70 bpm", "air"]
    together = reader.choose(captions, SEEDS)
    for row in range(3):
        alone = reader.choose(captions[row : row + 1], SEEDS[row : row + 1])
        assert torch.equal(alone, together[row : row + 1])
    torch.testing.assert_close(reader(captions)[:1], reader(captions[:1]), rtol=1e-4, atol=1e-5)


def test_it_comes_back_from_disk(reader, tmp_path):
    save_model(reader, tmp_path / "tempo_reader")
    back = load_model(tmp_path / "tempo_reader", {"TempoReader": TempoReader})
    assert torch.equal(back(["a hymn at 80 bpm"]), reader(["a hymn at 80 bpm"]))


def test_what_does_not_fit_is_refused(reader):
    with pytest.raises(ValueError, match="tokenizer has 2.. tokens, wanted at most the 5 of text"):
        TempoReader(TextTransformer(16, 1, num_tokens=5), tokenizer=reader.tokenizer)
    with pytest.raises(ValueError, match="texts is empty"):
        reader([])
    with pytest.raises(ValueError, match="want a description"):
        reader(["a reel", " "])


# What a stage makes of it.


@pytest.fixture(scope="module")
def stage(with_opinions):
    torch.manual_seed(0)
    return with_opinions(
        SemanticTransformer(
            num_semantic_tokens=12, conditioning_size=8, conditioning_length=2, dim=16, depth=2,
            heads=2, dim_head=8, max_frames=64, frame_rate_hz=25.0,
        )
    ).eval()  # fmt: skip


def draw(stage, tempo, **changes):
    options = {"conditioning": CONDITIONING, "context": None, "prefix": NOTHING, "frames": 30}
    options |= {"seeds": SEEDS, "sampling": Sampling(), "tempo": tempo}
    return decode_stage(stage, **options | changes)


def test_all_windows_are_at_one_tempo(stage, monkeypatch):
    from musiclm_engine.generation import windows

    tempi = []

    def watch(stage, **arguments):
        tempi.append(arguments["tempo"])
        return decode_stage(stage, **arguments)

    monkeypatch.setattr(windows, "decode_stage", watch)
    tokens = decode_overlapping(
        stage, conditioning=CONDITIONING, context=None, frames=20, window=8, seeds=SEEDS,
        sampling=Sampling(guidance=2.0), tempo=TEMPI,
    )  # fmt: skip
    assert tokens.shape == (3, 20, 1) and len(tempi) == 4
    assert all(torch.equal(tempo, TEMPI) for tempo in tempi)


def test_the_tempo_shows_in_what_is_drawn(stage):
    assert not torch.equal(draw(stage, TEMPI), draw(stage, TEMPI + 10))


def test_rows_of_several_tempi_are_what_they_are_alone(stage):
    together = draw(stage, TEMPI)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = draw(
            stage, TEMPI[rows], conditioning=CONDITIONING[rows], prefix=NOTHING[rows],
            seeds=SEEDS[rows],
        )  # fmt: skip
        assert torch.equal(alone, together[rows])


def test_any_precision_has_a_tempo(stage):
    for dtype in (torch.float64, torch.bfloat16):
        other = SemanticTransformer.from_config(stage.config)
        other.load_state_dict(stage.state_dict())
        tokens = draw(other.to(dtype).eval(), TEMPI, frames=5, sampling=Sampling(guidance=2.0))
        assert tokens.shape == (3, 5, 1)


def test_tempi_of_another_form_are_refused(stage, tiny_musiclm):
    with pytest.raises(ValueError, match="tempo is missing, this stage has a clock"):
        draw(stage, None)
    for other in (TEMPI[:2], TEMPI.float(), TEMPI[None], 120, [10, 50, 90]):
        with pytest.raises(ValueError, match=r"tempo is .*, wanted a tensor of int64 \[3\]"):
            draw(stage, other)
    with pytest.raises(ValueError, match="tempo spans 10 to 104, wanted 0 to 103"):
        draw(stage, torch.tensor([10, 50, NUM_TEMPI]))
    plain = tiny_musiclm.audiolm
    with pytest.raises(ValueError, match="tempo is given, this stage has no clock"):
        plain.generate(CONDITIONING, seconds=0.4, seeds=SEEDS, tempo=TEMPI)


# Both in one model.


@pytest.fixture(scope="module")
def model(tiny_musiclm, stage, reader):
    """`tiny_musiclm` with a semantic stage that counts beats."""
    from musiclm_engine import AudioLM

    own = tiny_musiclm.audiolm
    audiolm = AudioLM(
        semantic=stage, coarse=own.coarse, fine=own.fine, codec=own.codec, windows=own.windows
    )
    parts = {name: getattr(tiny_musiclm, name) for name in ("mulan", "quantizer", "tokenizer")}
    return MusicLM(
        **parts, audiolm=audiolm, tempo_reader=reader, sampling=tiny_musiclm.sampling
    ).eval()


def test_each_prompt_is_played_at_the_tempo_that_is_read_in_it(model, reader, monkeypatch):
    tempi = {"a reel": 70, "a hymn": 20}

    def read(captions):
        return F.one_hot(torch.tensor([tempi[c] for c in captions]), NUM_TEMPI).float().log()

    monkeypatch.setattr(reader, "forward", read)
    both = model.generate(list(tempi), seconds=0.4, num_samples=2)
    for n, (prompt, tempo) in enumerate(tempi.items()):
        assert torch.equal(both.tempo_bpm[n], bpm_of(torch.tensor([tempo, tempo])))
        alone = model.generate(prompt, seconds=0.4, num_samples=2)
        assert torch.equal(alone.tokens["semantic"][0], both.tokens["semantic"][n])
    tempi["a reel"] = 71
    other = model.generate(list(tempi), seconds=0.4, num_samples=2).tokens["semantic"]
    assert not torch.equal(other[0], both.tokens["semantic"][0])
    assert torch.equal(other[1], both.tokens["semantic"][1])


def test_candidates_may_have_tempi_of_their_own(model):
    made = model.generate("a reel", seconds=0.4, num_samples=8)
    assert len(made.tempo_bpm.unique()) > 1
    drawn = model.choose_tempo(
        ["a reel"] * 8, made.sample_seeds[0]
    )  # of the best first, as they are
    assert torch.equal(bpm_of(drawn), made.tempo_bpm[0])
    again = model.choose_tempo(["a reel"] * 2, made.sample_seeds[0, 2:4])
    assert torch.equal(again, drawn[2:4])


def test_at_temperature_0_all_candidates_are_one(model):
    made = model.generate("a reel", seconds=0.4, num_samples=4, temperature=0.0)
    assert len(made.tempo_bpm.unique()) == 1
    for row in made.tokens["semantic"][0]:
        assert torch.equal(row, made.tokens["semantic"][0, 0])


def test_a_model_in_training_mode_reads_as_any_other(model):
    dropping = build_reader([words.format(90) for words in WORDS], ff_dropout=0.5)
    parts = ("mulan", "quantizer", "tokenizer", "audiolm", "sampling")
    other = MusicLM(**{name: getattr(model, name) for name in parts}, tempo_reader=dropping)
    captions = [f"a reel in {n}" for n in range(20)]
    seeds = derive_seeds(0, count=20)
    calm = other.eval().choose_tempo(captions, seeds)
    assert torch.equal(other.train().choose_tempo(captions, seeds), calm) and other.training
    other.eval()  # parts of it are others' too


def test_clips_are_continued_at_the_tempo_of_their_first_caption(model, tiny_corpus):
    clips = load_manifest(tiny_corpus, "train")
    bench = SimpleNamespace(
        model=model,
        audio=lambda some, seconds: torch.zeros(len(some), round(seconds * model.sample_rate)),
        progress=lambda what, done, of: None,
    )
    chosen = clips_to_continue(bench, clips, count=3, seed=0)
    first = {clip.piece: clip.captions[0] for clip in clips}
    wanted = model.choose_tempo([first[piece] for piece in chosen.pieces], SEEDS, temperature=0.0)
    assert torch.equal(chosen.tempo, wanted)


def test_the_record_tells_the_tempo(model, tiny_musiclm, tmp_path):
    def candidates(of):
        made = of.generate("a reel", seconds=0.4, num_samples=2)
        request = Request(prompts=("a reel",), seconds=0.4, num_samples=2)
        write_outputs(made, request, tmp_path / "a.wav", spectrogram=False, model_sha256="")
        return made, json.loads((tmp_path / "a.json").read_text())["candidates"]

    made, told = candidates(model)
    assert [row["tempo_bpm"] for row in told] == [round(x, 1) for x in made.tempo_bpm[0].tolist()]
    made, told = candidates(tiny_musiclm)
    assert made.tempo_bpm is None and "tempo_bpm" not in told[0]


def test_a_model_with_a_reader_comes_back_from_disk(model, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.float32)
    back = MusicLM.from_pretrained(tmp_path)
    prompts = ["a reel at 120 bpm"]
    assert torch.equal(
        back.generate(prompts, seconds=0.4).audio, model.generate(prompts, seconds=0.4).audio
    )
    (tmp_path / "tempo_reader.json").unlink()
    with pytest.raises(CheckpointError, match="tempo_reader.json is missing"):
        MusicLM.from_pretrained(tmp_path)


def test_no_reader_of_another_model_is_left_behind(model, tiny_musiclm, tiny_folder, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.float32)
    tiny_musiclm.save_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(tmp_path) == fingerprint(tiny_folder)


def test_what_is_too_long_to_be_read_is_told(model, tiny_musiclm):
    assert model.unread("a hymn at 80 bpm") == tiny_musiclm.unread("a hymn at 80 bpm") == ""
    words = [str(n) for n in range(100, 300)]
    rest = model.unread(" ".join(words))
    assert rest.split() == words[-len(rest.split()) :] and len(rest.split()) > 100
    read = len(words) - len(rest.split())
    whole, cut = " ".join(words[:read]), " ".join([*words[:read], "999"])
    assert model.unread(whole) == "" and model.unread(cut) == "999"


def test_a_reader_and_a_clock_belong_together(model, tiny_musiclm, reader):
    def build(audiolm, tempo_reader):
        own = {name: getattr(model, name) for name in ("mulan", "quantizer", "tokenizer")}
        return MusicLM(**own, audiolm=audiolm, tempo_reader=tempo_reader, sampling=model.sampling)

    with pytest.raises(
        ValueError, match="tempo_reader is missing, the semantic stage counts beats"
    ):
        build(model.audiolm, None)
    with pytest.raises(ValueError, match="tempo_reader is given, the semantic stage counts frames"):
        build(tiny_musiclm.audiolm, reader)
    assert tiny_musiclm.choose_tempo(["a reel"], SEEDS[:1]) is None


@pytest.mark.parametrize(
    "words",
    ["a tune on a flute in D major at {} bpm", "Slow hymn, church organ, {} BPM",
     "a reel on a fiddle, at about {} beats per minute", "opus 96, a reel at {} bpm, version 2",
     "music from 1750: {} bpm, for 2 flutes, in 3/4"],
)  # fmt: skip
def test_the_bundled_model_reads_tempi(words):
    model = MusicLM.from_pretrained()
    wanted = torch.arange(56, 152, 8)
    prompts = [words.format(int(bpm)) for bpm in wanted]
    tempo = model.choose_tempo(prompts, derive_seeds(0, count=len(prompts)))
    off = (bpm_of(tempo) / wanted - 1).abs()
    assert (off <= 0.04).float().mean() >= 0.9 and off.median() < 0.02
