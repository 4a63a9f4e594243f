"""The calls that a capture makes to ``torch.cuda``, replaced by stand-ins. Tests of the graphs themselves record on CPUs."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from quietstar.hf.graphs import CudaCapture


@pytest.fixture
def streams(monkeypatch):
    """The stream of each capture."""
    used = []

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        used.append(stream)
        yield

    class Graph:
        def replay(self):
            pass

    for name, stand_in in {
        "graph": graph,
        "CUDAGraph": Graph,
        "Stream": lambda device: f"a stream of {device}",
        "graph_pool_handle": object,
        "memory_reserved": lambda device: 0,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return used


def test_each_device_is_captured_on_its_own_stream(streams):
    """If a model moves to another GPU, a capture on the first GPU's stream would not record its work."""
    capture = CudaCapture()
    for i in (0, 0, 1):
        capture(lambda: (), torch.device("cuda", i))
    assert streams == ["a stream of cuda:0"] * 2 + ["a stream of cuda:1"]
