"""The benchmarks are scripts: their folder goes on the path. Tests look at results and rows, never at times."""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "float32": 1e11}  # ceilings, made up


@pytest.fixture
def device():
    return CPU


@pytest.fixture
def rates():
    return RATES


@pytest.fixture
def effort():
    from compare import Effort

    return Effort(rounds=2, budget=0.05)
