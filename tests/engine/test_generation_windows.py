"""Pieces longer than a stage's window."""

import pytest
import torch

from musiclm_engine import CoarseTransformer, FineTransformer
from musiclm_engine.generation import Sampling, derive_seeds
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.windows import decode_overlapping, decode_side_by_side

WIDTH = {"dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "max_frames": 64}
CONDITIONING = torch.tensor([[1, 2], [3, 4]])
SEEDS = derive_seeds(0, count=2)
DRAW = {"conditioning": CONDITIONING, "seeds": SEEDS, "sampling": Sampling()}


@pytest.fixture(scope="module")
def coarse(with_opinions):
    torch.manual_seed(0)
    return with_opinions(
        CoarseTransformer(
            num_semantic_tokens=12,
            codebook_size=10,
            num_coarse_quantizers=2,
            frames_per_semantic=2,
            conditioning_size=8,
            conditioning_length=2,
            **WIDTH,
        )
    ).eval()


@pytest.fixture(scope="module")
def fine(with_opinions):
    torch.manual_seed(0)
    return with_opinions(
        FineTransformer(
            codebook_size=10,
            num_coarse_quantizers=2,
            num_fine_quantizers=2,
            conditioning_size=8,
            conditioning_length=2,
            **WIDTH,
        )
    ).eval()


def semantic_tokens(frames):
    return torch.randint(12, (2, frames, 1), generator=torch.Generator().manual_seed(2))


def coarse_tokens(frames):
    return torch.randint(10, (2, frames, 2), generator=torch.Generator().manual_seed(2))


def test_one_window_is_plain_decoding(coarse):
    context = semantic_tokens(6)
    plain = decode_stage(
        coarse,
        context=context,
        prefix=torch.zeros(2, 0, 2, dtype=torch.int64),
        frames=12,
        **{**DRAW, "seeds": torch.cat([derive_seeds(int(s), 0, count=1) for s in SEEDS])},
    )
    windowed = decode_overlapping(coarse, context=context, frames=12, window=12, **DRAW)
    assert torch.equal(windowed, plain)


def test_each_window_continues_the_half_before_it(coarse, monkeypatch):
    """Seen from inside: prefixes are the tokens that were there, contexts their own stretch."""
    from musiclm_engine.generation import windows

    calls = []

    def watch(stage, **arguments):
        piece = decode_stage(stage, **arguments)
        calls.append((arguments, piece))
        return piece

    monkeypatch.setattr(windows, "decode_stage", watch)
    context = semantic_tokens(16)
    tokens = decode_overlapping(coarse, context=context, frames=31, window=12, **DRAW)
    assert tokens.shape == (2, 31, 2)

    starts = [0, 6, 12, 18, 24]  # the last makes one frame: 24 .. 31, of which 24 .. 30 are given
    assert len(calls) == len(starts)
    for (arguments, piece), start in zip(calls, starts, strict=True):
        end = min(start + 12, 31)
        given = arguments["prefix"].shape[1]
        assert given == (0 if start == 0 else 6) and arguments["frames"] == end - start
        assert torch.equal(arguments["prefix"], tokens[:, start : start + given])
        assert torch.equal(piece, tokens[:, start:end])  # nothing of the overlap was rewritten
        assert torch.equal(arguments["context"], context[:, start // 2 : -(-end // 2)])
    assert len({tuple(arguments["seeds"].tolist()) for arguments, _ in calls}) == len(starts)


def test_a_longer_piece_begins_like_a_shorter_one(coarse):
    context = semantic_tokens(20)
    short = decode_overlapping(coarse, context=context[:, :12], frames=24, window=12, **DRAW)
    long = decode_overlapping(coarse, context=context, frames=40, window=12, **DRAW)
    assert torch.equal(long[:, :24], short)


def test_overlapping_rows_do_not_see_each_other(coarse):
    context = semantic_tokens(16)
    both = decode_overlapping(coarse, context=context, frames=32, window=12, **DRAW)
    alone = decode_overlapping(
        coarse,
        conditioning=CONDITIONING[1:],
        context=context[1:],
        frames=32,
        window=12,
        seeds=SEEDS[1:],
        sampling=Sampling(),
    )
    assert torch.equal(alone, both[1:])


@pytest.mark.parametrize("frames", [24, 21])
def test_side_by_side_is_each_window_by_itself(fine, frames):
    context = coarse_tokens(frames)
    together = decode_side_by_side(fine, context=context, window=8, **DRAW)
    assert together.shape == (2, frames, 2)
    for row in range(2):
        seeds = derive_seeds(int(SEEDS[row]), "window", count=3)
        for number, start in enumerate(range(0, frames, 8)):
            own = context[row : row + 1, start : start + 8]
            alone = decode_stage(
                fine,
                conditioning=CONDITIONING[row : row + 1],
                context=own
                if own.shape[1] == 8
                else torch.cat([own, own[:, -1:].expand(1, 8 - own.shape[1], 2)], 1),
                prefix=torch.zeros(1, 0, 2, dtype=torch.int64),
                frames=8,
                seeds=seeds[number : number + 1],
                sampling=Sampling(),
            )
            found = together[row : row + 1, start : start + 8]
            assert torch.equal(found, alone[:, : found.shape[1]]), (row, number)


def test_equal_windows_of_one_row_differ(fine):
    """Each window has a seed of its own: a repeated bar is not played alike to the sample."""
    context = coarse_tokens(8).repeat(1, 2, 1)
    tokens = decode_side_by_side(fine, context=context, window=8, **DRAW)
    assert not torch.equal(tokens[:, :8], tokens[:, 8:])


def test_a_piece_shorter_than_the_window(fine):
    context = coarse_tokens(5)
    wide = decode_side_by_side(fine, context=context, window=64, **DRAW)
    assert torch.equal(wide, decode_side_by_side(fine, context=context, window=5, **DRAW))


def test_a_window_without_frames_is_refused(coarse, fine):
    with pytest.raises(ValueError, match="window is 0"):
        decode_overlapping(coarse, context=semantic_tokens(2), frames=4, window=0, **DRAW)
    with pytest.raises(ValueError, match="window is 0"):
        decode_side_by_side(fine, context=coarse_tokens(4), window=0, **DRAW)


def test_a_window_of_half_a_semantic_token_is_refused(coarse):
    """Its seams would fall between the moments of the context."""
    with pytest.raises(ValueError, match="window is 7 frames, wanted a multiple of 2"):
        decode_overlapping(coarse, context=semantic_tokens(8), frames=16, window=7, **DRAW)
