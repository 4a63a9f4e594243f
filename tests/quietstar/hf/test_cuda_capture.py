"""The calls that a capture makes to ``torch.cuda``, replaced by stand-ins. Tests of the graphs themselves record on CPUs."""

import contextlib

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
        "mem_get_info": lambda device: (2**29, 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return used


def test_each_device_is_captured_on_its_own_stream(streams):
    """If a model moves to another GPU, a capture on the first GPU's stream would not record its work."""
    capture = CudaCapture()
    for i in (0, 0, 1):
        capture(lambda: (), torch.device("cuda", i), "thoughts")
    assert streams == ["a stream of cuda:0"] * 2 + ["a stream of cuda:1"]


@pytest.mark.parametrize(
    "what, kept, fits",
    [("thoughts", 2**27, True), ("thoughts", 2**28, False), ("steps", 2**29, True), ("steps", 2**29 + 1, False)],
)
def test_what_a_graph_may_keep(streams, monkeypatch, what, kept, fits):
    """Of a GiB, half of which is free: an eighth, or as much as is left for eager steps."""
    reserved = iter([0, kept])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    with contextlib.nullcontext() if fits else pytest.raises(RuntimeError, match=r"^it would keep 0\.[25] GiB$"):
        CudaCapture()(lambda: (), torch.device("cuda", 0), what)
