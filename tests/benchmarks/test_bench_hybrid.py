"""The benchmark of hybrid models: its copies are those of the layout, and only right results are timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_hybrid
from benchmarks.bench_hybrid import BOTH, OURS, SEQUENCES, STATES, DecodeCase, DeltaCase, Repeated
from benchmarks.harness.case import Wrong

CPU = torch.device("cpu")
CASES = {case.grid: case for case in bench_hybrid.smoke(CPU) if type(case) is DeltaCase}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_copy_is_what_the_last_row_of_a_branch_sees(case):
    seen = case.layout.dense_mask()[0]
    last = case.L + case.S * torch.arange(1, case.P * case.N + 1) - 1
    copies = [row[row < case.layout.M] for rows in case.copies for row in rows]
    assert len(copies) == case.P * case.N
    assert all(torch.equal(seen[r].nonzero()[:, 0], copy) for r, copy in zip(last, copies, strict=True))


@pytest.mark.parametrize("what", BOTH)
@pytest.mark.parametrize("candidate", [OURS, *SEQUENCES], ids=lambda x: x.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_right_results_pass_and_wrong_ones_are_refused(case, candidate, what):
    case = replace(case, what=what)
    if reason := candidate.why_not(case):
        pytest.skip(reason)
    function = candidate.prepare(case)
    case.check(function)
    rule = function.rule if isinstance(function, Repeated) else function
    for wrong in (lambda q, k, v, g, beta: rule(q, k, v, 0 * g, beta), lambda *rows: rule(*rows) + 0.01 * rows[0]):
        with pytest.raises(Wrong):
            case.check(Repeated(wrong) if isinstance(function, Repeated) else wrong)


@pytest.mark.parametrize(
    "candidate, reads", [(OURS, "own"), *((x, "state") for x in STATES)], ids=lambda x: getattr(x, "name", x)
)
def test_a_step_of_decoding_is_checked(candidate, reads):
    (case,) = (case for case in bench_hybrid.smoke(CPU) if isinstance(case, DecodeCase))
    if reason := candidate.why_not(case):
        pytest.skip(reason)
    function = candidate.prepare(case)
    case.check(function)

    def other(inputs):
        past = inputs[reads]
        return function(inputs | {reads: past._replace(w=2 * past.w) if candidate is OURS else 2 * past})

    with pytest.raises(Wrong):
        case.check(other)
