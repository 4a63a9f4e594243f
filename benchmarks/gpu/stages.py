"""The stages of ``make gpu``: their processes, the order and time limits of these, and how their outcome is judged."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import judges
from benchmarks.gpu.judges import Judge
from benchmarks.report.missing import STAGES
from benchmarks.report.tables import TITLES

ROOT, TESTS = Path(__file__).parents[2], "tests/kernels"
WRAPPER = "tests/quietstar/test_triton.py"  # the wrapper on Triton, where graphs are really replayed
OPS = ("thought_attention", "thought_decode", "sample_token", "linear_logprob")
LIMIT = 235  # seconds per stage, under four minutes
WITHOUT_A_GPU = ("ahead_of_time", "cuda_wheel", "cuda_build_switch")
# The ops of a benchmark stage, and the minutes after which it starts no further case.
BENCHMARKS = {
    "attention": (["thought_attention"], 1.7),
    "decode": (["thought_decode"], 0.8),
    "head": (["sample_token", "linear_logprob"], 1.4),
    "step": (["step"], 1.6),
    "naive": (["naive"], 0.7),
}
WARM, LONGEST_CASE = 48, 45  # seconds
FIRST_CALLS = {f"first call, {what}": what for what in judges.FIRST_CALL_GOALS}


@dataclass(frozen=True)
class Step:
    """Processes that run at the same time.

    Attributes:
        commands: by name.
        limit: seconds.
        judge: turns the outcomes into verdicts.
    """

    commands: dict[str, list[str]]
    limit: float
    judge: Judge


@dataclass(frozen=True)
class Stage:
    """Steps that run one after the other."""

    name: str
    steps: list[Step]


@dataclass(frozen=True)
class Plan:
    """The stages.

    Attributes:
        results: the file that benchmarks write their rows to.
        rehearsal: whether to run everything at its smallest, on the CPU.
    """

    results: Path
    rehearsal: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def stages(self, names: Sequence[str] = ()) -> list[Stage]:
        """The named stages in the order of ``STAGES``, or all of them."""
        return [Stage(name, self._steps(name)) for name in STAGES if not names or name in names]

    def _steps(self, name: str) -> list[Step]:
        if name in BENCHMARKS:
            first_calls = self._first_calls() if name == "attention" else []
            return [*self._benchmark(*BENCHMARKS[name]), *first_calls]
        steps = {"check": self._check, "build": self._build, "tests": self._tests, "others": self._others}
        return (steps | {"sanitize": self._sanitize})[name]()

    def _check(self) -> list[Step]:
        command = [*_module("quietstar_kernels"), "check", "--device", self.device]
        return [Step({"": command}, 90, judges.each(judges.check))]

    def _build(self) -> list[Step]:
        """Compile into this folder, for this GPU. A rehearsal finds no nvcc."""
        capability = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
        variables = ["QUIETSTAR_BUILD=cuda", f"TORCH_CUDA_ARCH_LIST={capability.replace('9.0', '9.0a')}"]
        variables += ["CUDA_HOME=/nowhere"] if self.rehearsal else []
        command = ["env", *variables, sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return [Step({"": command}, 150, judges.each(judges.build))]

    def _tests(self) -> list[Step]:
        """Each core runs a share of the tests: those of the ops first, and none of the back ends for CPUs."""
        shares = min(16, os.cpu_count() or 1)
        pytest = [*_module("pytest"), "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-m", "not build and not long"]
        first = [f"{TESTS}/test_{op}.py" for op in OPS]
        if self.rehearsal:
            pytest += [*first, WRAPPER, "-k", "triton and (edges or strided or large_and_equal)"]
        else:
            pytest += [*first, *(file for file in _files() if file not in first), WRAPPER, "-k", "not cpu"]
        commands = {f"{share + 1} of {shares}": [*pytest, "--shard", f"{share}/{shares}"] for share in range(shares)}
        return [Step(commands, 200, judges.tests)]

    def _benchmark(self, ops: list[str], minutes: float) -> list[Step]:
        """Compile ahead, then measure, first ours alone in all cases. A rehearsal calls all ops at once."""
        smallest = ["--smoke"] if self.rehearsal else []
        device = ["--device", self.device]
        warm = [*_module("benchmarks.gpu.warm"), "--op", *(TITLES if self.rehearsal else ops), *device, *smallest]
        timed = [*_module("benchmarks.run"), "--op", *ops, *device, "--json", str(self.results), "--ours-first"]
        timed += ["--smoke", "--ceiling-size", "64"] if self.rehearsal else ["--minutes", str(minutes)]
        steps = [Step({"benchmark": timed}, 60 * minutes + LONGEST_CASE, judges.each(judges.benchmark))]
        if not self.rehearsal or ops == BENCHMARKS["attention"][0]:
            steps.insert(0, Step({"compile ahead": warm}, WARM, judges.each(judges.warm)))
        return steps

    def _first_calls(self) -> list[Step]:
        """One after the other, since they are timed. The interpreter's time would be of no use."""
        command = [*(["env", "QUIETSTAR_BACKEND=cpu"] if self.rehearsal else []), *_module("benchmarks.gpu.first_call")]
        return [
            Step({name: [*command, what, "--device", self.device]}, 20, judges.each(judges.first_call))
            for name, what in FIRST_CALLS.items()
        ]

    def _others(self) -> list[Step]:
        """The benchmarks that have no stage of their own."""
        named = [op for ops, _ in BENCHMARKS.values() for op in ops]
        return self._benchmark([op for op in TITLES if op not in named], 1.0)

    def _sanitize(self) -> list[Step]:
        """The small cases on their own, which also compiles them, then under compute-sanitizer."""
        cases = [*_module("benchmarks.gpu.small_cases"), "--device", self.device, *(["--rehearse"] if self.rehearsal else [])]
        alone = Step({"small cases": cases}, 60, judges.each(judges.small_cases))
        sanitizer = shutil.which("compute-sanitizer")
        if not sanitizer:
            return [alone]
        watched = {name: [sanitizer, "--tool", name, "--error-exitcode", "9", *cases] for name in ("memcheck", "racecheck")}
        return [alone, Step(watched, LIMIT - 60, judges.each(judges.sanitizer))]


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _files() -> list[str]:
    """Those with tests that need no more than a GPU."""
    found = sorted((ROOT / TESTS).glob("test_*.py"))
    return [f"{TESTS}/{file.name}" for file in found if not file.stem.endswith(WITHOUT_A_GPU)]
