"""The bias between two tokens, against the formula written down slowly."""

import math

import pytest
import torch

from musiclm_engine.audiolm.position import GAIN, OUTSIDE_TIME, TimeLevelBias

HEADS, LEVELS, MAX_FRAMES = 2, 3, 20


@pytest.fixture
def position():
    torch.manual_seed(0)
    position = TimeLevelBias(HEADS, LEVELS, MAX_FRAMES)
    torch.nn.init.normal_(position.relative_attention_bias)
    torch.nn.init.normal_(position.outside_bias)
    return position


def looked_up(position, q_code, k_code):
    """What attention adds for this pair of codes (design, section 3)."""
    table = position.table()
    index = int(q_code) - int(k_code) + position.offset
    return table[:, min(max(index, 0), table.shape[1] - 1)]


def test_every_difference_within_reach_has_an_entry_of_its_own(position):
    moments = torch.arange(MAX_FRAMES + 1)
    codes = torch.stack([position.code(moments, level) for level in range(LEVELS)], dim=1)
    assert codes.dtype == torch.int32
    seen = set()
    for tq in range(MAX_FRAMES + 1):
        for lq in range(LEVELS):
            for tk in range(MAX_FRAMES + 1):
                for lk in range(LEVELS):
                    wanted = position.relative_attention_bias[
                        :, MAX_FRAMES + tq - tk, LEVELS - 1 + lq - lk
                    ]
                    found = looked_up(position, codes[tq, lq], codes[tk, lk])
                    assert torch.equal(found, GAIN * wanted), (tq, lq, tk, lk)
                    seen.add((tq - tk, lq - lk))
    assert len(seen) == position.relative_attention_bias[0].numel()


def test_heads_begin_by_looking_near_and_everywhere():
    position = TimeLevelBias(3, 1, MAX_FRAMES)
    table = position.table()
    for slope, head in zip((2.0, 1.0, 0.0), table, strict=True):
        for frames in (-MAX_FRAMES, -1, 0, 7):
            entry = head[position.offset + frames].item()
            assert entry == pytest.approx(-slope * math.log(1 + abs(frames)), abs=1e-6)
        assert head[-1] == 0


def test_tokens_outside_time_are_read_at_the_last_entry(position):
    for moment in (0, 1, MAX_FRAMES, 100_000):
        for level in range(LEVELS):
            code = position.code(torch.tensor(moment), level)
            found = looked_up(position, code, OUTSIDE_TIME)
            assert torch.equal(found, GAIN * position.outside_bias[:, 0])


def test_the_table_is_differentiable_and_float32(position):
    table = position.double().table()
    assert table.dtype == torch.float32
    assert table.shape == (HEADS, (2 * MAX_FRAMES + 1) * (2 * LEVELS - 1) + 1)
    table.sum().backward()
    assert (position.relative_attention_bias.grad == GAIN).all()
    assert (position.outside_bias.grad == GAIN).all()


@pytest.mark.parametrize("levels", [1, 4])
def test_codes_tell_all_tokens_apart(levels):
    position = TimeLevelBias(1, levels, 8)
    moments = torch.arange(30)
    codes = torch.cat([position.code(moments, level) for level in range(levels)])
    assert len(codes.unique()) == 30 * levels
