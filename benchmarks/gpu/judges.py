"""What the outcomes of a step of ``make gpu`` mean.

A judge maps outcomes to verdicts, both by name. A verdict is whether the process passed, None if neither can be said, and a
note on what it found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from benchmarks.gpu.processes import Outcome

Verdict = tuple[bool | None, str]
Judge = Callable[[dict[str, Outcome]], dict[str, Verdict]]
FIRST_CALL_GOALS = {"forward": 2.0, "forward+backward": 4.0}  # seconds


def each(judge: Callable[[str, Outcome], Verdict]) -> Judge:
    return lambda outcomes: {name: judge(name, outcome) for name, outcome in outcomes.items()}


def check(name: str, outcome: Outcome) -> Verdict:
    """``python -m quietstar_kernels check``."""
    if outcome.code is None:
        return None, outcome.end
    if outcome.code == 0 and not re.search(r"\bok$", outcome.output, re.MULTILINE):
        return None, "nothing was checked"
    return outcome.code == 0, outcome.last_line if outcome.code in (0, 1) else f"{outcome.end}: {outcome.last_line}"


def build(name: str, outcome: Outcome) -> Verdict:
    """A missing nvcc is not a failure. If compiling fails, report the compiler's first error."""
    if outcome.code == 0:
        return True, "compiled for this GPU"
    if outcome.code is None:
        return False, outcome.end
    if outcome.last_line.startswith("QUIETSTAR_BUILD=cuda: "):
        return None, outcome.last_line
    errors = re.findall(r"^.*\b(?:fatal )?error\b.*$", outcome.output, re.MULTILINE | re.IGNORECASE)
    return False, (errors[0].strip() if errors else outcome.last_line)[:300]


def tests(outcomes: dict[str, Outcome]) -> dict[str, Verdict]:
    """One verdict for all shares of the tests."""
    output = "\n".join(outcome.output for outcome in outcomes.values())
    words = ("PASSED", "FAILED", "ERROR")
    counts = {word: len(re.findall(rf"^tests/.* {word}", output, re.MULTILINE)) for word in words}
    note = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count or word == "PASSED")
    broken = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)))
    broken = broken or sorted(set(re.findall(r"^(tests/\S+) (?:FAILED|ERROR)", output, re.MULTILINE)))
    if broken:
        note += ": " + ", ".join(test.rpartition("::")[2] for test in broken[:8]) + (" ..." if len(broken) > 8 else "")
    stopped = [name for name, outcome in outcomes.items() if outcome.code is None]
    odd = [outcome for outcome in outcomes.values() if outcome.code not in (None, 0, 1)]
    if stopped:
        note += f"; {len(stopped)} of {len(outcomes)} processes stopped at their time limit"
    if odd:
        note += f"; {odd[0].end}: {odd[0].last_line}"
    if odd or counts["FAILED"] or counts["ERROR"] or any(outcome.code == 1 for outcome in outcomes.values()):
        return {"": (False, note)}
    return {"": (None if stopped else True, note)}


def small_cases(name: str, outcome: Outcome) -> Verdict:
    return (None if outcome.code is None else outcome.code == 0), outcome.end if outcome.code is None else outcome.last_line


def sanitizer(name: str, outcome: Outcome) -> Verdict:
    """racecheck is only reported, since it takes copies by TMA and the operands of wgmma for hazards."""
    found = re.findall(r"ERROR SUMMARY: (.*)|RACECHECK SUMMARY: (.*)", outcome.output)
    note = "".join(found[-1]) if found else outcome.last_line
    if outcome.code is None:
        return None, outcome.end
    if name == "racecheck":
        return None, f"{note}; not judged"
    return outcome.code == 0, note


def first_call(name: str, outcome: Outcome) -> Verdict:
    if outcome.code != 0:
        return (None if outcome.code is None else False), f"{outcome.end}: {outcome.last_line}"
    seconds = json.loads(outcome.last_line)
    goal = FIRST_CALL_GOALS[name.removeprefix("first call, ")]
    met = "pass" if seconds["first call"] < goal else "miss"
    note = f"{seconds['first call']:.2f} s, goal < {goal:g} s: {met}; another length {seconds['another length']:.2f} s"
    return None, note


def benchmark(name: str, outcome: Outcome) -> Verdict:
    if outcome.code is None:
        return None, outcome.end
    return outcome.code == 0, outcome.last_line if outcome.code == 0 else f"{outcome.end}: {outcome.last_line}"


def warm(name: str, outcome: Outcome) -> Verdict:
    """Never a failure: what fails here fails again in the benchmark."""
    found = re.findall(r"^\d+ candidates called, .*", outcome.output, re.MULTILINE)
    return None, found[-1] if found else f"{outcome.end}: {outcome.last_line}"
