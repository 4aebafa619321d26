"""One result file for all suites of a pytest run."""

import pytest
import torch

from benchmarks.record import Recorder, recorder_for


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def recorder(device: torch.device) -> Recorder:
    return recorder_for(device)
