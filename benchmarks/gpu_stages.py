"""The stages of ``make gpu``: which processes, in which order, for how long, and who judges them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import judges
import run
from judges import Judge
from missing import STAGES

HERE, TESTS = Path(__file__).parent, "tests/kernels"
WRAPPER = "tests/quietstar/test_triton.py"  # the wrapper on Triton, with graphs that are really replayed
PYTHON = [sys.executable]
LIMIT = 235  # seconds of a stage at most: each is under four minutes
WITHOUT_A_GPU = ("ahead_of_time", "cuda_wheel", "cuda_build_switch", "bindings")
# The ops of a benchmark stage, and the minutes after which it starts no new case.
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
    """Processes that run beside each other.

    Attributes:
        commands: by name.
        limit: seconds.
    """

    commands: dict[str, list[str]]
    limit: float
    judge: Judge


@dataclass(frozen=True)
class Stage:
    """Steps one after the other."""

    name: str
    steps: list[Step]


@dataclass(frozen=True)
class Plan:
    """What all stages depend on.

    Attributes:
        results: the file that benchmarks write their rows to.
        rehearsal: everything at its smallest, on the CPU.
    """

    results: Path
    rehearsal: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def stages(self, names: Sequence[str] = ()) -> list[Stage]:
        """Those named, in the order of ``STAGES``; without a name all."""
        return [Stage(name, self._steps(name)) for name in STAGES if not names or name in names]

    def _steps(self, name: str) -> list[Step]:
        if name in BENCHMARKS:
            first_calls = self._first_calls() if name == "attention" else []
            return [*self._benchmark(*BENCHMARKS[name]), *first_calls]
        steps = {"check": self._check, "build": self._build, "tests": self._tests, "others": self._others}
        return (steps | {"sanitize": self._sanitize})[name]()

    def _check(self) -> list[Step]:
        command = [*PYTHON, "-m", "quietstar_kernels", "check", "--device", self.device]
        return [Step({"": command}, 90, judges.each(judges.check))]

    def _build(self) -> list[Step]:
        """Into this folder, for this GPU. A rehearsal finds no nvcc."""
        capability = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
        variables = ["QUIETSTAR_BUILD=cuda", f"TORCH_CUDA_ARCH_LIST={capability.replace('9.0', '9.0a')}"]
        variables += ["CUDA_HOME=/nowhere"] if self.rehearsal else []
        command = ["env", *variables, *PYTHON, "setup.py", "-q", "build_ext", "--inplace"]
        return [Step({"": command}, 150, judges.each(judges.build))]

    def _tests(self) -> list[Step]:
        """A share of the tests for each core."""
        shares = min(16, os.cpu_count() or 1)
        pytest = [*PYTHON, "-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
        if self.rehearsal:
            pytest += [f"{TESTS}/test_thought_attention.py", f"{TESTS}/test_thought_decode.py", f"{TESTS}/test_sample_token.py"]
            pytest += [
                f"{TESTS}/test_linear_logprob.py",
                WRAPPER,
                "-k",
                "triton and (edges or strided or large_and_equal or captured)",
            ]
        else:
            pytest += [TESTS, WRAPPER, *(f"--ignore={file}" for file in _files_without_a_gpu())]
        commands = {f"{share + 1} of {shares}": [*pytest, "--shard", f"{share}/{shares}"] for share in range(shares)}
        return [Step(commands, 200, judges.tests)]

    def _benchmark(self, ops: list[str], minutes: float) -> list[Step]:
        """Compile ahead, then measure: ours in all cases first."""
        smallest = ["--smoke"] if self.rehearsal else []
        warm = [*PYTHON, str(HERE / "warm.py"), "--op", *ops, "--device", self.device, *smallest]
        timed = [
            *PYTHON,
            str(HERE / "run.py"),
            "--op",
            *ops,
            "--device",
            self.device,
            "--json",
            str(self.results),
            "--ours-first",
        ]
        timed += ["--smoke", "--ceiling-size", "64"] if self.rehearsal else ["--minutes", str(minutes)]
        return [
            Step({"compile ahead": warm}, WARM, judges.each(judges.warm)),
            Step({"benchmark": timed}, 60 * minutes + LONGEST_CASE, judges.each(judges.benchmark)),
        ]

    def _first_calls(self) -> list[Step]:
        """One after the other: each is a time, and so of no use by the interpreter."""
        command = [*(["env", "QUIETSTAR_BACKEND=cpu"] if self.rehearsal else []), *PYTHON, str(HERE / "first_call.py")]
        return [
            Step({name: [*command, what, "--device", self.device]}, 20, judges.each(judges.first_call))
            for name, what in FIRST_CALLS.items()
        ]

    def _others(self) -> list[Step]:
        """The benchmarks that no stage names."""
        named = [op for ops, _ in BENCHMARKS.values() for op in ops]
        return self._benchmark([op for op in run.MODULES if op not in named], 1.0)

    def _sanitize(self) -> list[Step]:
        """The small cases alone, which also compiles them, then each under compute-sanitizer."""
        cases = [*PYTHON, str(HERE / "small_cases.py"), "--device", self.device, *(["--rehearse"] if self.rehearsal else [])]
        alone = Step({"small cases": cases}, 60, judges.each(judges.small_cases))
        sanitizer = shutil.which("compute-sanitizer")
        if not sanitizer:
            return [alone]
        watched = {name: [sanitizer, "--tool", name, "--error-exitcode", "9", *cases] for name in ("memcheck", "racecheck")}
        return [alone, Step(watched, LIMIT - 60, judges.each(judges.sanitizer))]


def _files_without_a_gpu() -> list[str]:
    found = sorted((HERE.parent / TESTS).glob("test_*.py"))
    return [f"{TESTS}/{file.name}" for file in found if file.stem.endswith(WITHOUT_A_GPU)]
