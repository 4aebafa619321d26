"""The drop-in classes against vector-quantize-pytorch: golden/make_quantize.py says how."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from musiclm_engine import quantize

GOLDEN = Path(__file__).with_name("golden")
UPSTREAM = json.loads((GOLDEN / "quantize.json").read_text())


@pytest.fixture(scope="module")
def ours():
    """What the calls that made the golden file give with our classes."""
    spec = importlib.util.spec_from_file_location("make_quantize", GOLDEN / "make_quantize.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker.run(quantize)


@pytest.mark.parametrize("case", UPSTREAM)
def test_the_state_has_upstreams_names_and_shapes(ours, case):
    assert ours[case]["keys"] == UPSTREAM[case]["keys"]


@pytest.mark.parametrize("case", UPSTREAM)
def test_the_numbers_are_upstreams(ours, case):
    assert len(ours[case]["outputs"]) == len(UPSTREAM[case]["outputs"])
    for found, wanted in zip(ours[case]["outputs"], UPSTREAM[case]["outputs"], strict=True):
        # the file has six decimals
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(wanted), atol=3e-6, rtol=1e-5, check_dtype=False
        )


def test_no_case_is_left_out(ours):
    assert ours.keys() == UPSTREAM.keys() and len(UPSTREAM) == 22
