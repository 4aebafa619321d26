"""The bias between two tokens, against the formula written down slowly."""

import math

import pytest
import torch

from musiclm_engine.audiolm.position import OUTSIDE_TIME, TimeLevelBias

HEADS, LEVELS, MAX_FRAMES, BUCKETS, FAR = 2, 3, 20, 16, 12


@pytest.fixture(scope="module")
def position():
    torch.manual_seed(0)
    position = TimeLevelBias(HEADS, LEVELS, MAX_FRAMES, num_buckets=BUCKETS, max_distance=FAR)
    torch.nn.init.normal_(position.relative_attention_bias)
    torch.nn.init.normal_(position.outside_bias)
    return position


def looked_up(position, q_code, k_code):
    """What attention adds for this pair of codes (design, section 3)."""
    table = position.table()
    index = int(q_code) - int(k_code) + position.offset
    return table[:, min(max(index, 0), table.shape[1] - 1)]


def t5_bucket(frames):
    """arXiv 1910.10683 and its published code: bidirectional, half the buckets a direction."""
    bucket = BUCKETS // 2 if frames < 0 else 0
    distance, exact = abs(frames), BUCKETS // 4
    if distance < exact:
        return bucket + distance
    share = math.log(distance / exact) / math.log(FAR / exact)
    return bucket + min(exact + int(share * exact), BUCKETS // 2 - 1)


def test_every_pair_within_reach_reads_its_bucket(position):
    moments = torch.arange(MAX_FRAMES)
    codes = torch.stack([position.code(moments, level) for level in range(LEVELS)], dim=1)
    assert codes.dtype == torch.int32
    seen = set()
    for tq in range(MAX_FRAMES):
        for lq in range(LEVELS):
            for tk in range(MAX_FRAMES):
                for lk in range(LEVELS):
                    wanted = position.relative_attention_bias[
                        :, t5_bucket(tq - tk), lq - lk + LEVELS - 1
                    ]
                    found = looked_up(position, codes[tq, lq], codes[tk, lk])
                    assert torch.equal(found, wanted), (tq, lq, tk, lk)
                    seen.add((t5_bucket(tq - tk), lq - lk))
    assert {bucket for bucket, _ in seen} == set(range(BUCKETS)) - {BUCKETS // 2}  # -0 is no time


def test_tokens_outside_time_are_read_at_the_last_entry(position):
    for moment in (0, 1, MAX_FRAMES, 100_000):
        for level in range(LEVELS):
            code = position.code(torch.tensor(moment), level)
            found = looked_up(position, code, OUTSIDE_TIME)
            assert torch.equal(found, position.outside_bias[:, 0])


def test_the_table_is_differentiable_and_float32(position):
    table = position.double().table()
    assert table.dtype == torch.float32
    assert table.shape == (HEADS, 2 * MAX_FRAMES * (2 * LEVELS - 1) + 2)
    table.sum().backward()
    assert position.relative_attention_bias.grad.any() and (position.outside_bias.grad == 1).all()
    position.float()


@pytest.mark.parametrize("levels", [1, 4])
def test_codes_tell_all_tokens_apart(levels):
    position = TimeLevelBias(1, levels, 8)
    moments = torch.arange(30)
    codes = torch.cat([position.code(moments, level) for level in range(levels)])
    assert len(codes.unique()) == 30 * levels
