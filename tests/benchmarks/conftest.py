"""What tests of the benchmarks share. They look at results and rows, never at times."""

import pytest
import torch

from benchmarks.harness.compare import Conditions, Effort

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "float32": 1e11}  # made up


@pytest.fixture
def device():
    return CPU


@pytest.fixture
def conditions():
    return Conditions(RATES, Effort(rounds=2, budget=1.0))
