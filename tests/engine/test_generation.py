"""Tokens drawn one after another, and AudioLM's three stages in their order."""

import math

import numpy
import pytest
import torch

from musiclm_engine import AudioLM, CoarseTransformer, FineTransformer, SemanticTransformer
from musiclm_engine.generation import Decoding, Sampling, StageSampling, Windows, derive_seeds
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.windows import decode_overlapping, decode_side_by_side

WIDTH = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "max_frames": 64}


@pytest.fixture(scope="module")
def stage(with_opinions):
    torch.manual_seed(0)
    stage = SemanticTransformer(
        num_semantic_tokens=12, conditioning_size=8, conditioning_length=2, **WIDTH
    )
    return with_opinions(stage).eval()


@pytest.fixture(scope="module")
def audiolm(tiny_musiclm):
    return tiny_musiclm.audiolm


CONDITIONING = torch.tensor([[1, 2], [3, 4], [5, 6]])
SEEDS = derive_seeds(0, count=3)


def decode(
    stage,
    *,
    conditioning=CONDITIONING,
    seeds=SEEDS,
    frames=20,
    given=None,
    capacity=None,
    decoding=None,
    **sampling,
):
    prefix = torch.zeros(len(conditioning), 0, 1, dtype=torch.int64) if given is None else given
    return decode_stage(
        stage,
        conditioning=conditioning,
        context=None,
        prefix=prefix,
        frames=frames,
        seeds=seeds,
        sampling=Sampling(**sampling),
        capacity=capacity,
        decoding=decoding,
    )


# Seeds.


def test_seeds_never_change():
    """Golden: another value here is other music for everyone's seeds."""
    assert derive_seeds(0, count=2).tolist() == [
        5104172916443561106,
        9017893900260303862,
    ]
    assert derive_seeds(1, "coarse", 3, count=2).tolist() == [
        9177140720275938709,
        1232887491406321934,
    ]


def test_seeds_depend_on_every_part():
    seeds = [
        *derive_seeds(0, count=50).tolist(),
        *derive_seeds(1, count=50).tolist(),
        *derive_seeds(0, "coarse", count=50).tolist(),
        *derive_seeds(0, 1, count=50).tolist(),
    ]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seeds(0, count=50).tolist() == seeds[:50]  # more samples keep the first ones


def test_a_number_is_the_same_seed_in_any_type():
    wanted = derive_seeds(3, count=1)
    assert torch.equal(derive_seeds(numpy.int64(3), count=1), wanted)
    assert torch.equal(derive_seeds(torch.tensor(3), count=1), wanted)
    with pytest.raises(TypeError):
        derive_seeds(3.5, count=1)


# Settings.


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"guidance": math.inf},
        {"guidance": math.nan},
        {"temperature": "hot"},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, wanted"):
        Sampling(**setting)


def test_whole_numbers_are_fine_for_top_k():
    assert Sampling(top_k=5.0) == Sampling(top_k=5) and isinstance(Sampling(top_k=5.0).top_k, int)


# One stage.


def test_a_seed_repeats_and_another_differs(stage):
    tokens = decode(stage)
    assert tokens.shape == (3, 20, 1) and tokens.min() >= 0 and tokens.max() < 12
    assert torch.equal(decode(stage), tokens)
    assert not torch.equal(decode(stage, seeds=derive_seeds(1, count=3)), tokens)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_row_alone_is_the_row_in_a_batch(stage, guidance):
    tokens = decode(stage, guidance=guidance)
    for row in range(3):
        alone = decode(
            stage,
            conditioning=CONDITIONING[row : row + 1],
            seeds=SEEDS[row : row + 1],
            guidance=guidance,
        )
        assert torch.equal(alone, tokens[row : row + 1])


def test_a_stage_in_float64_is_decoded_in_it(stage):
    wide = type(stage).from_config(stage.config).eval()
    wide.load_state_dict(stage.state_dict())
    assert torch.equal(decode(wide.double(), temperature=0.0), decode(stage, temperature=0.0))


def test_conditioning_matters(stage):
    other = decode(stage, conditioning=CONDITIONING.flip(0))
    assert not torch.equal(other, decode(stage))


def test_guidance_of_one_is_no_guidance(stage):
    """The path with twins, next to one, draws what the path without does."""
    assert torch.equal(decode(stage, guidance=1.0 + 1e-6), decode(stage, guidance=1.0))


def test_guidance_of_nothing_forgets_the_conditioning(stage):
    nothing = torch.full_like(CONDITIONING, stage.null)
    assert torch.equal(decode(stage, guidance=0.0), decode(stage, conditioning=nothing))


def test_temperature_zero_is_the_likeliest_by_forward(stage):
    tokens = decode(stage, temperature=0.0)
    likeliest = stage(CONDITIONING, None, tokens).argmax(-1)
    assert torch.equal(likeliest, tokens)
    assert torch.equal(decode(stage, top_k=1), tokens)  # the only one left to draw


def test_a_prefix_is_kept_and_continued_as_if_it_had_been_drawn(stage):
    tokens = decode(stage)
    assert torch.equal(decode(stage, given=tokens[:, :7]), tokens)
    other = (tokens[:, :7] + 1) % 12
    continued = decode(stage, given=other)
    assert torch.equal(continued[:, :7], other) and not torch.equal(continued, tokens)


def test_all_frames_given_is_all(stage):
    tokens = decode(stage)
    assert torch.equal(decode(stage, given=tokens), tokens)


def test_fewer_frames_than_are_given_are_refused(stage):
    with pytest.raises(ValueError, match="frames is 4, wanted at least the 5 of prefix"):
        decode(stage, frames=4, given=torch.zeros(3, 5, 1, dtype=torch.int64))


def test_seeds_that_are_no_whole_numbers_are_refused(stage, audiolm):
    seeds = torch.tensor([0.9, 1.0, 2.0])
    for run in (
        lambda: decode(stage, seeds=seeds),
        lambda: decode_overlapping(
            stage, conditioning=CONDITIONING, context=None, frames=4, window=2, seeds=seeds,
            sampling=Sampling(),
        ),
        lambda: decode_side_by_side(
            audiolm.fine, conditioning=CONDITIONING, window=2, seeds=seeds, sampling=Sampling(),
            context=torch.zeros(3, 4, 2, dtype=torch.int64),
        ),
        lambda: generate(audiolm, seconds=0.1, seeds=seeds),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="seeds are torch.float32, wanted int64"):
            run()


@pytest.mark.parametrize("decoding", ["int8", torch.int8, {}])
def test_what_is_no_decoding_is_refused(stage, tiny_musiclm, decoding):
    for run in (
        lambda: decode(stage, decoding=decoding),
        lambda: tiny_musiclm.generate("a hymn", seconds=0.1, decoding=decoding),
    ):
        with pytest.raises(TypeError, match=r"decoding is .*, wanted a Decoding, .* or None"):
            run()


def test_room_for_more_changes_nothing(stage):
    assert torch.equal(decode(stage, capacity=50), decode(stage))


def test_the_same_precision_by_name_changes_nothing(stage):
    named = Decoding(weight_dtype=torch.float32)
    assert torch.equal(decode(stage, decoding=named), decode(stage))


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(weight_dtype=torch.bfloat16),
        Decoding(weight_dtype=torch.int8),
        Decoding(weight_dtype=torch.int8, cache_dtype=torch.float8_e4m3fn),
    ],
)
def test_fewer_bits_begin_alike_and_draw_alike_each_time(stage, decoding):
    tokens = decode(stage, decoding=decoding)
    assert torch.equal(decode(stage, decoding=decoding), tokens)
    assert (tokens[:, 0] == decode(stage)[:, 0]).float().mean() > 0.5
    alone = decode(stage, decoding=decoding, conditioning=CONDITIONING[1:2], seeds=SEEDS[1:2])
    assert torch.equal(alone, tokens[1:2])


# All three.


def generate(audiolm, rows=slice(None), seconds=1.0, **arguments):
    arguments = {"seeds": SEEDS[rows], **arguments}
    return audiolm.generate(CONDITIONING[rows], seconds=seconds, **arguments)


def test_shapes_of_all_three(audiolm):
    made = generate(audiolm, seconds=0.99)
    assert made.audio.shape == (3, 15840) and made.audio.dtype == torch.float32
    assert made.audio.abs().max() <= 1
    assert {name: tuple(tokens.shape) for name, tokens in made.tokens.items()} == {
        "semantic": (3, 25),
        "coarse": (3, 50, 2),
        "fine": (3, 50, 1),
    }
    assert all(tokens.dtype == torch.int64 for tokens in made.tokens.values())


@pytest.mark.parametrize(
    "seconds, frames", [(0.001, 2), (0.04, 2), (0.0401, 4), (0.99, 50), (1.0, 50), (10.0, 500)]
)
def test_frames_hold_the_seconds_in_whole_semantic_tokens(audiolm, seconds, frames):
    assert audiolm.frames(seconds) == frames
    assert frames / audiolm.codec.frame_rate_hz >= seconds - 1e-6


def test_rounding_makes_no_frame_more(audiolm):
    """0.1 + 0.2 is a little more than 0.3; no frame is spent on it."""
    assert audiolm.frames(0.04 * 3) == audiolm.frames(0.12) == 6


def test_one_sample_is_the_least(audiolm):
    assert generate(audiolm, seconds=1 / 16000).audio.shape == (3, 1)
    for seconds in (1e-5, 1e-9):
        with pytest.raises(ValueError, match="seconds is .*, wanted .* at least a sample"):
            generate(audiolm, seconds=seconds)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_seconds_that_are_none_are_refused(audiolm, seconds):
    with pytest.raises(ValueError, match="seconds is"):
        generate(audiolm, seconds=seconds)


def test_a_row_of_all_three_alone_is_the_row_in_a_batch(audiolm):
    together, alone = generate(audiolm), generate(audiolm, slice(1, 2))
    for name, tokens in together.tokens.items():
        assert torch.equal(alone.tokens[name], tokens[1:2]), name
    assert torch.equal(alone.audio, together.audio[1:2])


def test_audio_is_the_decoded_tokens(audiolm):
    made = generate(audiolm, seconds=0.5)
    codes = torch.cat([made.tokens["coarse"], made.tokens["fine"]], dim=2)
    torch.testing.assert_close(made.audio, audiolm.codec.decode(codes)[:, :8000])


def test_all_three_take_the_decoding_asked_for(audiolm, monkeypatch):
    from musiclm_engine.generation import stage_steps

    asked = []

    def watch(stage, **options):
        asked.append((type(stage).__name__, options))
        return make(stage, **options)

    make = stage_steps.decoder_from_stage
    monkeypatch.setattr(stage_steps, "decoder_from_stage", watch)
    wanted = Decoding(weight_dtype=torch.int8)
    tokens = generate(audiolm, decoding=wanted).tokens
    assert asked == [  # once each, however many windows
        (f"{stage}Transformer", {"weight_dtype": torch.int8})
        for stage in ("Semantic", "Coarse", "Fine")
    ]
    again = generate(audiolm, decoding=wanted).tokens
    assert len(asked) == 3 and all(torch.equal(again[name], tokens[name]) for name in tokens)


def test_stages_draw_from_seeds_of_their_own(audiolm):
    """Equal seeds in all stages would tie the noise of one to that of the next."""
    settings = StageSampling(coarse=Sampling(temperature=0.0), fine=Sampling(temperature=0.0))
    first = generate(audiolm, sampling=settings)
    again = generate(audiolm, sampling=StageSampling(fine=Sampling(temperature=0.0)))
    assert torch.equal(first.tokens["semantic"], again.tokens["semantic"])
    assert not torch.equal(first.tokens["coarse"], again.tokens["coarse"])


@pytest.mark.parametrize("seconds", [0.1, 0.7, 2.5])  # within all windows; over some; over all
def test_progress_reaches_its_totals(audiolm, seconds):
    told: dict[str, list[tuple[int, int]]] = {}
    generate(
        audiolm,
        slice(0, 2),
        seconds=seconds,
        on_progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)),
    )
    assert list(told) == ["semantic", "coarse", "fine", "decode"]
    for stage, calls in told.items():
        total = calls[0][1]
        assert calls == [(done, total) for done in range(1, total + 1)], stage


def test_training_mode_changes_no_music_and_is_kept(audiolm):
    wanted = generate(audiolm, seconds=0.2)
    audiolm.train()
    try:
        made = generate(audiolm, seconds=0.2)
        assert audiolm.training and audiolm.coarse.transformer.training
    finally:
        audiolm.eval()
    assert torch.equal(made.audio, wanted.audio)


# Parts that do not belong together.


def parts(audiolm, **changes):
    own = {name: getattr(audiolm, name) for name in ("semantic", "coarse", "fine", "codec")}
    return AudioLM(**{**own, "windows": audiolm.windows, **changes})


def test_parts_that_do_not_fit_are_refused(audiolm):
    own = {"conditioning_size": 8, "conditioning_length": 2, **WIDTH}
    coarse = {"num_semantic_tokens": 12, "codebook_size": 16, "num_coarse_quantizers": 2}
    fine = {"codebook_size": 16, "num_coarse_quantizers": 2, "num_fine_quantizers": 1}
    for changes, message in (
        (
            {"coarse": CoarseTransformer(**{**coarse, "codebook_size": 9}, **own)},
            "CoarseTransformer speaks 9 codes, the codec 16",
        ),
        (
            {"fine": FineTransformer(**{**fine, "num_fine_quantizers": 2}, **own)},
            "2 coarse and 2 fine levels are more than the codec's 3",
        ),
        (
            {"fine": FineTransformer(**{**fine, "num_coarse_quantizers": 1}, **own)},
            "takes 1 coarse levels, the coarse stage gives 2",
        ),
        (
            {"semantic": SemanticTransformer(num_semantic_tokens=13, **own)},
            "takes 12 semantic tokens, the semantic stage gives 13",
        ),
        (
            {"fine": FineTransformer(**fine, **{**own, "conditioning_length": 3})},
            "FineTransformer takes 3 conditioning tokens of 8 values, .* 2 of 8",
        ),
        (
            {"coarse": CoarseTransformer(**coarse, **{**own, "conditioning_size": 7})},
            "CoarseTransformer takes 2 conditioning tokens of 7 values, .* 2 of 8",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parts(audiolm, **changes)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, "long"])
def test_windows_that_are_none_are_refused(seconds):
    with pytest.raises(ValueError, match="coarse_seconds is"):
        Windows(coarse_seconds=seconds)
