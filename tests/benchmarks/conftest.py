"""What tests of the benchmarks share. They look at results and rows, never at times."""

import pytest
import torch

from benchmarks.harness.compare import Effort

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "float32": 1e11}  # made up


@pytest.fixture
def device():
    return CPU


@pytest.fixture
def rates():
    return RATES


@pytest.fixture
def effort():
    return Effort(rounds=2, budget=1.0)
