"""The stages of ``make gpu``: what runs in which order, for how long, and how its outcome is judged.

A stage ends at its place in the schedule, even if it began early: what one leaves of its time, the next one may use.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT, TESTS = Path(__file__).parents[2], "tests/kernels"
TREES = f"{TESTS}/test_trees.py"
WRAPPER = "tests/quietstar/test_triton.py"  # the wrapper on Triton, where graphs are really replayed
OPS = ("thought_attention", "thought_decode", "sample_token", "linear_logprob")
OF_A_LAYER = ("rms_norm", "rotary", "rotary_decode", "gated_activation")
RECURRENT = ("thought_conv", "thought_delta")
WITHOUT_A_GPU = ("ahead_of_time", "cuda_wheel", "cuda_build_switch")
MINUTES = 11.0  # of all stages
# The most useful first: minutes, and what a stage is for.
STAGES = {
    "check": (1.0, "trees, whose kernels no GPU has run; every op against plain PyTorch; the copy in four ways, clocks, L2"),
    "sanitize": (
        1.0,
        "small cases of every kernel, alone and under memcheck and synccheck; attention in Gluon, which no GPU has run, "
        "against plain PyTorch; all later kernels are compiled",
    ),
    "hybrid": (
        0.9,
        "recurrent layers, which no GPU has run: against plain PyTorch, FLA in bf16 if it is there; then their times",
    ),
    "attention": (1.7, "our attention, by Triton and by Gluon, then alone; other tiles of both, and of dK, dV"),
    "profile": (1.1, "hardware counters of the attention kernels"),
    "peers": (1.5, "attention against the strongest other kernels"),
    "step": (
        1.2,
        "steps of an 8B and a 0.6B shape, with transformers' layers, with Liger's and compiled; the 20 largest kernels",
    ),
    "rollout": (0.8, "rollouts with and without a CUDA graph; thoughts at all positions against one after another"),
    "models": (0.8, "group RL end to end, trees, RLP"),
    "head": (0.5, "log-probabilities with and without kept logits, decoding, host time, sampling"),
    "tests": (0.5, "the other tests, until time is up"),
}


@dataclass(frozen=True)
class Rows:
    """Cases of some benchmarks, from some grids, against the baselines whose names begin so."""

    ops: tuple[str, ...]
    grids: tuple[str, ...]
    against: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """Of ``benchmarks.run`` and ``benchmarks.gpu.warm``."""
        return ["--op", *self.ops, "--grid", *self.grids, "--against", *self.against]


ATTENTION = ("thought_attention", "branches")
ROWS = {
    "hybrid": Rows(
        ("hybrid",),
        ("headline", "group", "decode", "GRPO"),
        ("repeated text, FLA", "branches through FLA", "a state per branch", "TRL"),
    ),
    "attention": Rows(ATTENTION, ("text", "headline", "many pairs", "prompt"), ("thought_attention, Gluon",)),
    "attention, alone": Rows(ATTENTION[:1], ("headline", "thoughts", "rows", "groups")),
    "peers": Rows(
        ATTENTION,
        ("text", "headline", "many pairs", "prompt", "prompts", "drafter"),
        ("FlexAttention, FLASH", "SDPA, repeated prompts"),
    ),
    "step, 8B": Rows(("step",), ("Llama 8B, LoRA",)),
    "step": Rows(("step",), ("0.6B", "0.6B, four layers"), ("QuietStar",)),
    "rollout": Rows(("step", "naive"), ("rollout", "headline"), ("QuietStar without a graph", "naive", "careful naive")),
    "models": Rows(
        ("group_rl", "trees"),
        ("headline", "end to end", "chain", "tree"),
        ("TRL", "SDPA, a sequence per leaf", "FlexAttention"),
    ),
    "models, online": Rows(("online",), ("short",), ("anchor by anchor", "a sequence for each")),
    "head": Rows(
        ("thought_decode", "linear_logprob", "sample_token"),
        ("headline",),
        (
            "thought_decode",
            "sample_token",
            "linear_logprob",
            "matmul, cross_entropy",
            "Liger",
            "Quack",
            "matmul, softmax, multinomial",
            "matmul, vLLM",
        ),
    ),
    "head, host": Rows(("host",), ("headline",)),
}


@dataclass(frozen=True)
class Step:
    """Processes that run at the same time; ``judges`` knows them by their names.

    Attributes:
        commands: by name, for the seconds that they have.
        part: of what is left of the stage's time.
    """

    commands: Callable[[float], dict[str, list[str]]]
    part: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Steps that run one after the other, and their seconds in the schedule."""

    name: str
    seconds: float
    steps: list[Step]


@dataclass(frozen=True)
class Plan:
    """The stages of a run.

    Attributes:
        results: the file that benchmarks write their rows to; texts lie beside it.
        minutes: of all stages, of which each gets its share.
        rehearsal: whether to run everything at its smallest, on the CPU.
    """

    results: Path
    minutes: float = MINUTES
    rehearsal: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def stages(self, names: Sequence[str] = ()) -> list[Stage]:
        """The named stages in the order of ``STAGES``, or all of them."""
        steps = {
            "check": self._check,
            "sanitize": self._sanitize,
            "hybrid": self._hybrid,
            "attention": self._attention,
            "profile": lambda: [self._text("counters")],
            "step": self._step,
            "models": lambda: [self._rows("models", 0.7), self._rows("models, online")],
            "head": lambda: [self._rows("head", 0.55), self._rows("head, host")],
            "tests": self._tests,
        }
        return [
            Stage(name, 60 * self.minutes * minutes / MINUTES, steps.get(name, lambda name=name: [self._rows(name)])())
            for name, (minutes, _) in STAGES.items()
            if not names or name in names
        ]

    def _check(self) -> list[Step]:
        """The tests of trees and ``check`` side by side; then, alone since it is timed, the device."""
        check = [*_module("quietstar_kernels"), "check", "--device", self.device]
        check += ["--backend", "triton", "--op", "sample_token"] if self.rehearsal else ["--op", *OPS, *OF_A_LAYER]
        device = [*_module("benchmarks.gpu.facts"), "--device", self.device, "--json", str(self.results)]
        device += ["--ceiling-size", "64"] if self.rehearsal else []
        trees = self._shares("trees ", [TREES], "triton and (path or packed)" if self.rehearsal else "not cpu")
        return [_step(trees | {"check": check}, 0.8), _step({"device": device})]

    def _sanitize(self) -> list[Step]:
        """The small cases alone and under compute-sanitizer, which sees where a tensor ends if PyTorch caches no memory. Beside
        them, since nothing is timed here, what later stages launch is compiled."""
        cases = [*_module("benchmarks.gpu.small_cases"), "--device", self.device]
        few, gluon = [*cases, "--few"], [*cases, "--gluon"]
        check = ["env", "QUIETSTAR_GLUON=1", *_module("quietstar_kernels"), "check", "--device", self.device]
        check += ["--backend", "triton", "--op", "sample_token" if self.rehearsal else "thought_attention"]
        commands = {"Gluon": check, "NaN, Gluon": gluon, "small cases": few if self.rehearsal else cases}
        commands["compile ahead"] = self._ahead()
        if sanitizer := shutil.which("compute-sanitizer"):
            watch = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--error-exitcode", "9", "--tool"]
            for name in ("memcheck", "synccheck"):
                commands |= {name: [*watch, name, *few], f"{name}, Gluon": [*watch, name, *gluon]}
        return [_step(commands)]

    def _ahead(self) -> list[str]:
        command = [*_module("benchmarks.gpu.warm"), "--device", self.device, *(["--smoke"] if self.rehearsal else [])]
        names = ("attention", "head") if self.rehearsal else ROWS  # an interpreter compiles nothing
        return command + [word for name in names for word in ("--rows", shlex.join(ROWS[name].options))]

    def _hybrid(self) -> list[Step]:
        """All back ends that are there on all kinds of layouts, before anything is timed."""
        check = [*_module("quietstar_kernels"), "check", "--device", self.device]
        check += ["--backend", "matmul", "--op", "thought_delta"] if self.rehearsal else ["--op", *RECURRENT]
        return [_step({"check": check}, 0.4), self._rows("hybrid")]

    def _attention(self) -> list[Step]:
        """The rows, then searches of tiles, which a CPU can't make and which print what they have found at their end."""
        rows = [self._rows("attention", 0.55), self._rows("attention, alone", 0.35)]

        def search(title: str, kernels: list[str], part: float) -> Step:
            command = [*_module("benchmarks.gpu.tiles"), *kernels, "--seconds"]
            return Step(lambda seconds: {title: [*command, f"{max(5.0, (seconds - 15) / len(kernels)):.0f}"]}, part)

        gluon = search("tiles, Gluon", ["forward in Gluon", "text keys in Gluon", "own keys"], 0.6)
        tiles = [gluon, search("tiles", ["forward"], 1.0)]
        return rows if self.rehearsal else rows + tiles

    def _step(self) -> list[Step]:
        """A step of 8B takes seconds, so that it comes first, without baselines."""
        return [self._rows("step, 8B", 0.5), self._rows("step", 0.55), self._text("kernels")]

    def _text(self, what: str) -> Step:
        """A profile, whose text goes beside the results."""
        out = self.results.with_name(f"{self.results.stem}-{what}.txt")
        return _step({what: [*_module("benchmarks.gpu.profiles"), what, "--device", self.device, "--out", str(out)]})

    def _rows(self, name: str, part: float = 1.0) -> Step:
        command = [*_module("benchmarks.run"), *ROWS[name].options, "--device", self.device, "--json", str(self.results)]
        command += ["--smoke", "--ceiling-size", "64"] if self.rehearsal else []
        title = name.partition(", ")[2] or "benchmark"
        return Step(lambda seconds: {title: [*command, "--minutes", f"{seconds / 60:.2f}"]}, part)

    def _tests(self) -> list[Step]:
        """Those of the ops first, and none of the back ends for CPUs."""
        first = [f"{TESTS}/test_{name}.py" for name in (*OPS, "decoder_layer")]
        if self.rehearsal:
            return [_step(self._shares("", [*first, WRAPPER], "triton and (edges or strided or large_and_equal)"))]
        rest = [file for file in _files() if file not in (*first, TREES)]
        return [_step(self._shares("", [*first, *rest, WRAPPER], "not cpu"))]

    def _shares(self, title: str, files: list[str], which: str) -> dict[str, list[str]]:
        """Each core runs a share of the tests."""
        shares = min(16, os.cpu_count() or 1)
        pytest = [*_module("pytest"), "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-m", "not build and not long"]
        return {
            f"{title}{i + 1} of {shares}": [*pytest, *files, "-k", which, "--shard", f"{i}/{shares}"] for i in range(shares)
        }


def _step(commands: dict[str, list[str]], part: float = 1.0) -> Step:
    """Of commands that need not know how long they have."""
    return Step(lambda seconds: commands, part)


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


def _files() -> list[str]:
    """Those with tests that need no more than a GPU."""
    found = sorted((ROOT / TESTS).glob("test_*.py"))
    return [f"{TESTS}/{file.name}" for file in found if not file.stem.endswith(WITHOUT_A_GPU)]
