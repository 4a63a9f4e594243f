"""The performance goals of this package, each computed from the rows of a run: the worst of those that it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.candidate import PACKAGE
from benchmarks.report import units
from benchmarks.report.results_file import RowDict

OPEN = "not measured"  # the verdict where the rows decide nothing
RIVALS = "rivals"  # in the place of a baseline: the fastest of those that do all the work
FORWARD, BOTH = "forward", "forward+backward"
FLEX, COPIES = "FlexAttention, compiled", "SDPA, repeated prompts"


@dataclass(frozen=True)
class Goal:
    """A bound on a column of some rows.

    Attributes:
        target: a lower bound, or an upper one if ``at_most``.
        op, kind, grids: of the rows; ``L``, if given, the shortest and the longest text.
        of: how the name of a baseline begins, whose column counts; our own rows without one.
        show: formats the target and what was reached.
    """

    what: str
    target: float
    op: str
    kind: str = FORWARD
    of: str = ""
    grids: tuple[str, ...] = ("headline",)
    L: tuple[float, float] = (0, float("inf"))
    column: str = "times_ours"
    at_most: bool = False
    show: Callable[[float], str] = units.times

    def verdict(self, rows: list[RowDict]) -> tuple[str, str, str]:
        """The goal, what was reached, and pass, miss or ``OPEN``."""
        goal = f"{'<=' if self.at_most else '>='} {self.show(self.target)}"
        found = [row[self.column] for row in rows if self._is_about(row) and row[self.column] is not None]
        if not found:
            return goal, "", OPEN
        got = (max if self.at_most else min)(found)
        return goal, self.show(got), "pass" if (got <= self.target if self.at_most else got >= self.target) else "miss"

    def _is_about(self, row: RowDict) -> bool:
        if (row["op"], row["what"]) != (self.op, self.kind) or row["grid"] not in self.grids or row["seconds"] is None:
            return False
        if not self.L[0] <= row["sizes"].get("L", 0) <= self.L[1]:
            return False
        if self.of == RIVALS:
            return is_rival(row)
        return not row["is_ours"] and row["candidate"].startswith(self.of) if self.of else row["is_ours"]


def is_rival(row: RowDict) -> bool:
    """Whether this is another implementation of all the work. Ours with another back end is not."""
    return not row["is_ours"] and not row["is_partial"] and not row["version"].startswith(PACKAGE)


def _share(what: str, target: float, op: str, kind: str = FORWARD, grids: tuple[str, ...] = ("headline",)) -> Goal:
    return Goal(f"{what}, share of the roofline", target, op, kind, grids=grids, column="of_roofline", show=units.percent)


def _time(what: str, target: float, op: str, kind: str) -> Goal:
    return Goal(what, target, op, kind, column="seconds", at_most=True, show=units.seconds)


LENGTHS: dict[str, Any] = {"grids": ("headline", "text")}
HOST = [
    _time("host time, attention forward + backward", 150e-6, "host", "attention forward+backward"),
    _time("host time, decode", 30e-6, "host", "decode"),
    _time("host time, sample_token", 30e-6, "host", "sample_token"),
]
GPU = [
    Goal("decode step, speedup over the fastest baseline", 2, "thought_decode", of=RIVALS),
    _share("decode step", 0.7, "thought_decode"),
    # Of causal texts of this length FlashAttention-3 has 560 on an H100 (meta-pytorch/tritonbench#1267).
    Goal("attention forward, L 2048, useful FLOP/s", 500e12, "thought_attention", L=(2048, 2048), column="flops_rate",
         show=units.flops, **LENGTHS),
    Goal("attention forward, L >= 2048, speedup over FlexAttention", 1.8, "thought_attention", of=FLEX, L=(2048, 1e9),
         **LENGTHS),
    Goal("attention forward, L >= 2048, speedup over FlexAttention FLASH", 1.25, "thought_attention", of="FlexAttention, FLASH",
         L=(2048, 1e9), **LENGTHS),
    Goal("attention forward, L <= 512, speedup over FlexAttention", 3, "thought_attention", of=FLEX, L=(1, 512), **LENGTHS),
    Goal("branches, drafter forward, speedup over FlexAttention", 2, "branches", of=FLEX, grids=("drafter",)),
    # huggingface/trl#7244 asks for 60 to 80 ms and about 6 GiB on an H100.
    _time("linear_logprob, 8192 x 4096 x 152k, time", 0.05, "linear_logprob", BOTH),
    Goal("linear_logprob, 8192 x 4096 x 152k, memory", 6 * 2**30, "linear_logprob", BOTH, column="peak_bytes", at_most=True,
         show=units.memory),
    _share("training step, Llama 8B class", 0.6, "step", "training step", ("Llama 8B, LoRA",)),
    Goal("thoughts at all positions, speedup over naive sampling", 100, "naive", "thoughts", of="naive"),
]  # fmt: skip
CPU = [
    _share("attention forward", 0.7, "thought_attention"),
    Goal("attention forward, speedup over compiled FlexAttention", 2.5, "thought_attention", of=FLEX, **LENGTHS),
    Goal("attention forward, L >= 256, speedup over dense SDPA", 15, "thought_attention", of="SDPA, dense mask", L=(256, 1e9),
         **LENGTHS),
    _share("attention forward + backward", 0.65, "thought_attention", BOTH),
    Goal("attention forward + backward, speedup over flash prefix + own block", 2, "thought_attention", BOTH,
         of="flash prefix + own block (PyTorch)"),
    _share("decode step", 0.55, "thought_decode"),
    Goal("decode step, speedup over the fastest baseline", 2.5, "thought_decode", of=RIVALS),
    Goal("training step, speedup over the published schedule", 3, "step", "training step", of="published schedule"),
    Goal("sample_token, speedup over matmul, softmax, multinomial", 6, "sample_token", of="matmul, softmax, multinomial"),
    Goal("linear_logprob, speedup over matmul, cross_entropy", 1.8, "linear_logprob", BOTH, of="matmul, cross_entropy"),
    Goal("a step of group RL, speedup over TRL's repeated prompts", 1.8, "group_rl", "loss and backward", of="TRL"),
    Goal("a step of RLP, speedup over a loop over anchors", 5, "online", "step", of="anchor by anchor"),
    Goal("a step of RLP, speedup over a sequence for each thought", 3, "online", "step", of="a sequence"),
    Goal("branches, speedup over repeated prompts", 0.95, "branches", of=COPIES, grids=("headline", "prompt")),
    Goal("thoughts at all positions, speedup over naive sampling", 20, "naive", "thoughts", of="naive"),
]  # fmt: skip


def of(kind: str) -> list[Goal]:
    """The goals for "cuda" or "cpu"."""
    return [*(GPU if kind == "cuda" else CPU), *HOST]
