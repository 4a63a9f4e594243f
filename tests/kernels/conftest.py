"""One suite for all back ends: a test that takes ``backend`` runs once for each."""

import pytest
import torch


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """``torch.empty`` gives NaN (the largest integer, for integers): what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
