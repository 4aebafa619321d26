"""The drop-in classes against the real packages: golden/make_attention.py says which, and how."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from musiclm_engine import attention

GOLDEN = Path(__file__).with_name("golden")
UPSTREAM = json.loads((GOLDEN / "attention.json").read_text())


@pytest.fixture(scope="module")
def ours():
    """What the calls that made the golden file give with our classes."""
    spec = importlib.util.spec_from_file_location("make_attention", GOLDEN / "make_attention.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)

    def t5_bucket(distance, bidirectional, num_buckets, max_distance):
        return attention.t5_bucket(
            distance,
            bidirectional=bidirectional,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )

    return maker.run(
        SimpleNamespace(
            RelativePositionBias=attention.RelativePositionBias,
            MultiQueryAttention=attention.MultiQueryAttention,
            CosineAttention=attention.CosineAttention,
            grid_network=attention.DynamicPositionBias2d,
            WindowAttention=attention.WindowAttention,
            T5Attention=attention.T5Attention,
            t5_bucket=t5_bucket,
        )
    )


@pytest.mark.parametrize("case", UPSTREAM)
def test_weights_have_upstreams_names_and_shapes(ours, case):
    assert ours[case]["keys"] == UPSTREAM[case]["keys"]


@pytest.mark.parametrize("case", UPSTREAM)
def test_the_numbers_are_upstreams(ours, case):
    assert len(ours[case]["outputs"]) == len(UPSTREAM[case]["outputs"])
    for found, wanted in zip(ours[case]["outputs"], UPSTREAM[case]["outputs"], strict=True):
        # the file has six decimals
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(wanted), atol=2e-6, rtol=1e-5, check_dtype=False
        )


def test_no_case_is_left_out(ours):
    assert ours.keys() == UPSTREAM.keys() and len(UPSTREAM) == 13
