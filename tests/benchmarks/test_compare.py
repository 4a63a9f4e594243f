"""Every candidate has a row, and only one with a right result has a time."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.bench_thought_attention import OURS, AttentionCase
from benchmarks.harness.candidate import Candidate, gluon, in_gluon
from benchmarks.harness.case import Case, Work
from benchmarks.harness.clock import Timing
from benchmarks.harness.compare import Gone, compare, input_sets
from quietstar_kernels.triton import gluon_is_on

TINY = AttentionCase(L=9, N=2, S=3, H=2, G=1, K=8)
RIGHT = Candidate("right", OURS.prepare)


class OnAGPU(Case):
    """A case whose candidates are functions of a number, on a GPU that isn't there."""

    op, what, grid, dtype, rotates = "sample_token", "forward", "headline", torch.float32, False

    def __init__(self, device):
        object.__setattr__(self, "device", device)

    def work(self):
        return Work(1e6, 1e6)

    def inputs(self, seed):
        return {}

    def call(self, function, inputs):
        return function(1)

    def check(self, function):
        self.call(function, {})


def altered(change):
    """A baseline that returns our output after ``change``."""

    def prepare(case):
        attend = OURS.prepare(case)
        return lambda q, k, v: change(attend(q, k, v))

    return Candidate("altered", prepare)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def one_wrong_row(out):
    out = out.clone()
    out[..., -1, :] *= 1.1
    return out


@pytest.mark.parametrize(
    "change", [lambda out: 1.001 * out, one_wrong_row, lambda out: out * float("nan"), lambda out: out[:, :, 1:]]
)
@pytest.mark.parametrize("what", ["forward", "forward+backward"])
def test_a_wrong_baseline_is_refused(change, what, conditions):
    ours, wrong, right = compare(replace(TINY, what=what), OURS, [altered(change), RIGHT], conditions)
    assert ours.seconds and right.seconds and ours.note == right.note == ""
    assert wrong.seconds is wrong.times_ours is wrong.peak_bytes is None
    assert "wrong result" in wrong.note or "failed" in wrong.note


def test_a_wrong_gradient_is_refused(conditions):
    wrong = altered(WrongGradient.apply)
    assert compare(TINY, OURS, [wrong], conditions)[1].seconds
    row = compare(replace(TINY, what="forward+backward"), OURS, [wrong], conditions)[1]
    assert row.seconds is None
    assert "refused, a wrong result: dq differs by 1.0e-02" in row.note


def test_missing_and_failing_baselines_have_rows_that_say_why(conditions):
    def explode(case):
        raise RuntimeError("no such kernel\nat line 3")

    def unknown(case):
        raise ImportError("no cutlass")

    baselines = [
        Candidate("missing", OURS.prepare, why_not=lambda case: "it is not installed here"),
        Candidate("failing", explode),
        Candidate("huge", OURS.prepare, needs=lambda case: Work(bytes=1e18)),
        Candidate("slow", OURS.prepare, needs=lambda case: Work(flops=1e13)),
        Candidate("odd", OURS.prepare, why_not=unknown),
    ]
    rows = compare(TINY, OURS, baselines, conditions)
    assert [row.candidate for row in rows] == ["thought_attention", "missing", "failing", "huge", "slow", "odd"]
    notes = [row.note for row in rows]
    assert notes[1:3] == ["it is not installed here", "failed: RuntimeError: no such kernel"]
    assert notes[3].startswith("not tried: it needs 9.31e+08 GiB")
    assert notes[4:] == ["not tried: a run takes at least 1e+02 s", "failed: ImportError: no cutlass"]
    assert rows[0].seconds and all(row.seconds is None for row in rows[1:])


def test_a_wrong_result_of_ours_is_refused_too(conditions):
    mine, baseline = compare(TINY, altered(lambda out: -out), [RIGHT], conditions)
    assert mine.is_ours and mine.seconds is None and "wrong result" in mine.note
    assert baseline.seconds and baseline.times_ours is None


def test_the_numbers_of_a_row(conditions):
    ours, baseline = compare(replace(TINY, what="forward+backward"), OURS, [RIGHT], conditions)
    work = replace(TINY, what="forward+backward").work()
    for row in (ours, baseline):
        assert row.low <= row.seconds <= row.high and row.rounds >= 1
        assert row.flops_rate == pytest.approx(work.flops / row.seconds)
        assert row.bytes_rate == pytest.approx(work.bytes / row.seconds)
        assert row.roofline == pytest.approx(max(work.flops / 1e11, work.bytes / 1e10))
        assert row.of_roofline == pytest.approx(row.roofline / row.seconds)
        assert row.bound_by == ("matmul" if work.flops / 1e11 > work.bytes / 1e10 else "copy")
        assert row.version
    assert ours.times_ours == 1 and baseline.times_ours == pytest.approx(baseline.seconds / ours.seconds)
    assert ours.is_ours and not baseline.is_ours


def test_rows_are_written_after_each_baseline_and_a_baseline_that_dies_takes_none_with_it(conditions):
    def dies(case):
        calls = iter(range(100))
        attend = OURS.prepare(case)

        def attend_for_a_while(q, k, v):
            if next(calls) > 1:  # the check and the measurement of its memory succeed
                raise RuntimeError("an illegal access")
            return attend(q, k, v)

        return attend_for_a_while

    written = []
    conditions = replace(conditions, write=lambda so_far: written.append(len(so_far)))
    rows = compare(TINY, OURS, [RIGHT, Candidate("dies", dies), RIGHT], conditions)
    assert written == [2, 4]
    assert [row.note for row in rows] == ["", "", "failed: RuntimeError: an illegal access", ""]
    assert rows[0].seconds and rows[0].rounds == 2 * conditions.effort.rounds and rows[3].times_ours


@pytest.mark.long
def test_small_inputs_rotate_and_large_ones_do_not(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.compare.cache_size", lambda device: 2**25)
    sets = input_sets(TINY)
    assert len(sets) == 8 == len({float(inputs["q"].sum()) for inputs in sets})
    assert len(input_sets(replace(TINY, L=600, N=4, S=16, H=8, G=8, K=128))) <= 2


@pytest.mark.parametrize("dies_in", ["prepare", "run"])
def test_what_was_measured_is_written_before_a_candidate_takes_a_gpu_down(dies_in, conditions, monkeypatch):
    """Nothing that follows in the process could be right, so it ends; ours has been timed alone before."""
    gone, written, calls = [], [], iter(range(100))

    def answer():
        if gone:
            raise RuntimeError("an illegal memory access was encountered")

    def die(*arguments):
        if dies_in == "prepare" or next(calls) > 1:  # the check and the measurement of its memory succeed
            gone.append(0)
            raise RuntimeError("an illegal memory access was encountered")
        return arguments[0]

    monkeypatch.setattr(torch.cuda, "synchronize", answer)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    for name, value in {"peak_memory": lambda run, device: run() and 1, "cache_size": lambda device: 0}.items():
        monkeypatch.setattr(f"benchmarks.harness.compare.{name}", value)
    took = lambda runs, *rest: {name: Timing([run[0]() and 1e-3]) for name, run in runs.items()}  # noqa: E731
    monkeypatch.setattr("benchmarks.harness.compare.measure", took)
    case, conditions = OnAGPU(torch.device("cuda")), replace(conditions, write=lambda rows: written.append(rows[:]))
    culprit = Candidate("culprit", die if dies_in == "prepare" else lambda case: die)
    with pytest.raises(Gone, match="the device is gone: failed: RuntimeError: an illegal memory access"):
        compare(case, Candidate("ours", lambda case: abs), [culprit, culprit], conditions)
    first, last = written
    assert [row.candidate for row in first] == ["ours"] and first[0].seconds == 1e-3 and first[0].times_ours == 1.0
    assert [row.note.partition(":")[0] for row in last] == ["", "failed"]


def test_ours_alone(conditions):
    (mine,) = compare(TINY, OURS, [], conditions)
    assert mine.is_ours and mine.seconds and mine.times_ours == 1 and mine.rounds == conditions.effort.rounds


def test_a_switch_is_on_while_its_candidate_is_checked_and_called_and_no_longer(conditions, monkeypatch):
    monkeypatch.delenv("QUIETSTAR_GLUON", raising=False)
    seen = {"ours": [], "its": []}

    def watched(case, name):
        def attend(q, k, v):
            out = OURS.prepare(case)(q, k, v)
            out.register_hook(lambda grad: seen[name].append(gluon_is_on()))
            return out

        return attend

    ours, its = (Candidate(name, partial(watched, name=name)) for name in seen)
    its = replace(its, switch=gluon)
    assert all(row.seconds for row in compare(replace(TINY, what="forward+backward"), ours, [its], conditions))
    assert {*seen["ours"]} == {False} and {*seen["its"]} == {True} and not gluon_is_on()


@pytest.mark.parametrize(
    "served, value, device, reason",
    [
        ("cpu", "0", "cpu", "attention is served by cpu here"),
        ("triton", "1", "cpu", "the default with QUIETSTAR_GLUON=1, measured above"),
        ("triton", "0", "cpu", "they serve Hopper, sm_90, and this is "),
    ],
)
def test_why_attention_in_gluon_is_not_measured(served, value, device, reason, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.candidate.served_by", lambda device: {"thought_attention": served})
    monkeypatch.setenv("QUIETSTAR_GLUON", value)
    assert reason in in_gluon(OURS.prepare).why_not(TINY)
