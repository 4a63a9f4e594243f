"""The clock's turns, warm-up and budget, and memory of a known size."""

import contextlib
import time

import pytest
import torch

from benchmarks.harness import clock
from benchmarks.harness.clock import ROUND, measure
from benchmarks.harness.memory import peak_memory


def test_candidates_take_turns_over_all_their_inputs(device):
    calls = []

    def slow(name):
        return lambda: (calls.append(name), time.sleep(1.5 * ROUND))

    timings = measure({"a": [slow("a0"), slow("a1")], "b": [slow("b0")]}, device, rounds=3)
    assert calls == ["a0", "b0", "a1", "b0", "a0", "b0", "a1", "b0"]  # warm-up, then three rounds
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]
    for timing in timings.values():
        assert ROUND < timing.low <= timing.median <= timing.high


def test_a_short_run_is_repeated_in_a_round(device):
    calls = []
    timing = measure({"short": [lambda: (calls.append(0), time.sleep(ROUND / 10))]}, device, rounds=1)["short"]
    assert 3 < len(calls) < 12
    assert timing.median < ROUND


def test_budget_ends_the_rounds_of_a_slow_candidate(device):
    slow, quick = (lambda: time.sleep(0.1)), (lambda: time.sleep(0.001))
    timings = measure({"slow": [slow], "quick": [quick]}, device, rounds=5, budget=0.15)
    assert len(timings["slow"].seconds) == 1
    assert len(timings["quick"].seconds) == 5


def test_peak_memory_sees_what_a_call_allocates(device):
    size = 64 << 20

    def run():
        torch.ones(size // 4).sum()
        return torch.ones(size // 16)

    got = peak_memory(run, device)
    if got is None:
        pytest.skip("memory is measured with glibc only")
    assert 0.9 * size < got < 1.5 * size


class FakeEvent:
    """A device event that reads the host's clock, for work done by the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class FakeGraph:
    replays = 0

    def replay(self):
        FakeGraph.replays += 1
        time.sleep(1e-4)


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(FakeGraph, "replays", 0)
    fakes = {"Event": FakeEvent, "CUDAGraph": FakeGraph, "Stream": FakeStream, "current_stream": FakeStream}
    fakes |= {"stream": lambda stream: contextlib.nullcontext(), "graph": lambda graph: contextlib.nullcontext()}
    for name, fake in (fakes | {"synchronize": lambda: None}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return torch.device("cuda")


def test_short_runs_on_a_gpu_are_replayed(fake_gpu, monkeypatch):
    monkeypatch.setattr(clock, "GRAPH_BELOW", 10.0)  # short on a busy machine, too
    calls = []
    runs = [lambda i=i: calls.append(i) for i in range(4)]
    timing = measure({"short": runs}, fake_gpu, rounds=3)["short"]
    assert timing.graph and len(timing.seconds) == 3
    assert calls == [0, 1, 2, 3] * 4  # warm-up, a timed pass, before the capture, the capture
    assert FakeGraph.replays > 11 + 3  # a warm-up, ten that determine how many fill a round, then three rounds
    assert timing.low >= 1e-4 / 4  # a replay has four runs


def test_a_graph_can_be_asked_for(fake_gpu, monkeypatch):
    for seconds, graph in ((0.005, True), (0.0, False)):
        timing = measure({"x": [lambda seconds=seconds: time.sleep(seconds)]}, fake_gpu, rounds=1, graph=graph)["x"]
        assert timing.graph is graph


def test_a_run_that_fills_a_round_is_not_timed_again(fake_gpu):
    """A training step may take seconds: after a warm-up the first timed pass is a round."""
    calls = []
    timing = measure({"slow": [lambda: (calls.append(0), time.sleep(1.5 * ROUND))]}, fake_gpu, rounds=3, budget=ROUND)["slow"]
    assert len(calls) == 2 and len(timing.seconds) == 1 and ROUND < timing.median
    calls.clear()
    timing = measure({"slow": [lambda: (calls.append(0), time.sleep(1.5 * ROUND))]}, fake_gpu, rounds=3)["slow"]
    assert len(calls) == 4 and len(timing.seconds) == 3


def test_long_runs_on_a_gpu_and_those_that_cannot_be_captured_are_not(fake_gpu, monkeypatch):
    timing = measure({"long": [lambda: time.sleep(0.005)]}, fake_gpu, rounds=2)["long"]
    assert not timing.graph and FakeGraph.replays == 0 and 0.005 < timing.median < 0.05

    @contextlib.contextmanager
    def refuse(graph):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    timing = measure({"waits": [lambda: None]}, fake_gpu, rounds=2)["waits"]
    assert not timing.graph and len(timing.seconds) == 2
