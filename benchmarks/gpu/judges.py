"""What the outcomes of the processes of ``make gpu`` mean.

A verdict is whether a process passed, None if neither can be said, and a note on what it found.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.gpu.processes import Outcome

Verdict = tuple[bool | None, str]
EMPTY = 5  # pytest's exit code for a share without a test


def verdicts(outcomes: dict[str, Outcome]) -> dict[str, Verdict]:
    """By the processes' names. Shares of tests, which are called such as "trees 1 of 16", have one verdict together."""
    found: dict[str, Verdict] = {}
    shares: dict[str, list[Outcome]] = {}
    for name, outcome in outcomes.items():
        if (title := title_of(name)) != name:
            shares.setdefault(title, []).append(outcome)
        else:
            found[name] = JUDGES.get(name, plain)(outcome)
    return {title: tests(of_title) for title, of_title in shares.items()} | found


def title_of(name: str) -> str:
    """Of a share of tests what all shares have in common; else the name."""
    return re.sub(r" ?\d+ of \d+$", "", name)


def plain(outcome: Outcome) -> Verdict:
    """By the exit code; the last line says what was found."""
    if outcome.code is None:
        return None, outcome.end
    return outcome.code == 0, outcome.last_line if outcome.code == 0 else f"{outcome.end}: {outcome.last_line}"


def check(outcome: Outcome) -> Verdict:
    """``python -m quietstar_kernels check``."""
    if outcome.code == 0 and not re.search(r"\bok$", outcome.output, re.MULTILINE):
        return None, "nothing was checked"
    return (False, outcome.last_line) if outcome.code == 1 else plain(outcome)


def tests(outcomes: list[Outcome]) -> Verdict:
    """One verdict for all shares of the tests, with the files that none of them has reached."""
    output = "\n".join(outcome.output for outcome in outcomes)
    words = ("PASSED", "FAILED", "ERROR")
    counts = {word: len(re.findall(rf"^tests/.* {word}", output, re.MULTILINE)) for word in words}
    note = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count or word == "PASSED")
    broken = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)))
    broken = broken or sorted(set(re.findall(r"^(tests/\S+) (?:FAILED|ERROR)", output, re.MULTILINE)))
    if broken:
        note += ": " + ", ".join(test.rpartition("::")[2] for test in broken[:8]) + (" ..." if len(broken) > 8 else "")
    stopped = [outcome for outcome in outcomes if outcome.code is None]
    odd = [outcome for outcome in outcomes if outcome.code not in (None, 0, 1, EMPTY)]
    if stopped:
        note += f"; {len(stopped)} of {len(outcomes)} processes stopped at their time limit"
        files = dict.fromkeys(word for outcome in outcomes for word in outcome.command if word.endswith(".py"))
        if late := [file.rpartition("/")[2] for file in files if f"\n{file}::" not in f"\n{output}"]:
            note += f"; not reached: {', '.join(late)}"
    if odd:
        note += f"; {odd[0].end}: {odd[0].last_line}"
    if odd or counts["FAILED"] or counts["ERROR"] or any(outcome.code == 1 for outcome in outcomes):
        return False, note
    return None if stopped or not counts["PASSED"] else True, note


def sanitizer(outcome: Outcome) -> Verdict:
    if "Device not supported" in outcome.output:  # as on some virtual machines
        return None, "it does not support this device"
    found = re.findall(r"ERROR SUMMARY: (.*)", outcome.output)
    return (outcome.code == 0, found[-1]) if found and outcome.code is not None else plain(outcome)


def gluon(outcome: Outcome) -> Verdict:
    """Of what runs or checks the kernels in Gluon, by itself or under compute-sanitizer."""
    if found := re.search(r"Gluon's do not run here: (.*)", outcome.output):
        return None, found[1]
    return sanitizer(outcome)


def warm(outcome: Outcome) -> Verdict:
    """Never a failure: what fails here fails again in the benchmark."""
    found = re.findall(r"^\d+ candidates called, .*", outcome.output, re.MULTILINE)
    return None, found[-1] if found else f"{outcome.end}: {outcome.last_line}"


def profile(outcome: Outcome) -> Verdict:
    """Never a failure of what is profiled. A machine may lack the tools."""
    return None, outcome.last_line if outcome.code == 0 else f"{outcome.end}: {outcome.last_line}"


def device(outcome: Outcome) -> Verdict:
    """The rates are also in the results file."""
    return (None, outcome.output.strip().rpartition("\n")[2]) if outcome.code == 0 else plain(outcome)


JUDGES: dict[str, Callable[[Outcome], Verdict]] = {
    "check": check,
    "device": device,
    "compile ahead": warm,
    "memcheck": sanitizer,
    "synccheck": sanitizer,
    "Gluon": gluon,
    "NaN, Gluon": gluon,
    "memcheck, Gluon": gluon,
    "synccheck, Gluon": gluon,
    "counters": profile,
    "kernels": profile,
    "tiles": profile,
    "tiles, Gluon": profile,
}
