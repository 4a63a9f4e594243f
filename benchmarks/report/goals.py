"""The performance goals of this package, each computed from the rows of a run.

A goal about a ratio takes the worst case among its rows. It has no verdict if none of them was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.baselines import trees
from benchmarks.baselines.branches import BranchCase
from benchmarks.harness.candidate import PACKAGE
from benchmarks.report import units
from benchmarks.report.results_file import RowDict

ATTENTION, DECODE = "thought_attention", "thought_decode"
FORWARD, BOTH = "forward", "forward+backward"
FLEX, FLASH, DENSE = "FlexAttention, compiled", "FlexAttention, FLASH", "SDPA, dense mask"
SOFTMAX = "matmul, softmax, multinomial"
PREFIX = "flash prefix + own block (PyTorch)"
BRANCHES, COPIES = "branches", "SDPA, repeated prompts"

OPEN = "not measured"  # the verdict where the rows decide nothing
Keep = Callable[[RowDict], bool]  # which rows a goal is about
Reached = Callable[[list[RowDict]], float | None]  # the value that the rows give, None if nothing was measured


@dataclass(frozen=True)
class Goal:
    """``target`` is a lower bound on what is reached, or an upper one if ``at_most``. ``show`` formats both."""

    what: str
    target: float
    reached: Reached
    show: Callable[[float], str] = units.times
    at_most: bool = False

    def verdict(self, rows: list[RowDict]) -> tuple[str, str, str]:
        """The goal, what was reached, and pass, miss or ``OPEN``."""
        goal = f"{'<=' if self.at_most else '>='} {self.show(self.target)}"
        got = self.reached(rows)
        if got is None:
            return goal, "", OPEN
        return goal, self.show(got), "pass" if (got <= self.target if self.at_most else got >= self.target) else "miss"


def _matching(rows: list[RowDict], op: str, what: str, keep: Keep) -> Iterator[RowDict]:
    return (row for row in rows if row["op"] == op and row["what"] == what and row["seconds"] is not None and keep(row))


def _any(row: RowDict) -> bool:
    return True


def _headline(row: RowDict) -> bool:
    return row["grid"] == "headline"


def _at(test: Callable[[int], bool]) -> Keep:
    """Rows whose length L satisfies ``test`` and whose other sizes are those of the headline."""
    return lambda row: row["grid"] in ("headline", "text") and test(row["sizes"]["L"])


_LONG, _SHORT, _ALL = _at(lambda L: L >= 2048), _at(lambda L: L <= 512), _at(lambda L: True)
_2048 = _at(lambda L: L == 2048)


def _is_64(L: int) -> bool:
    return L == 64


def _from_256(row: RowDict) -> bool:
    return row["sizes"]["L"] >= 256


def _many_draws(row: RowDict) -> bool:
    return row["sizes"]["R"] >= 256


def _eight_billion(row: RowDict) -> bool:
    return "8B" in row["grid"]


def _drafter(row: RowDict) -> bool:
    return row["grid"] == "drafter"


def _is_ours(row: RowDict) -> bool:
    return row["is_ours"]


def is_rival(row: RowDict) -> bool:
    """Whether this is another implementation of all the work. Ours with another back end is not."""
    return not row["is_ours"] and not row["is_partial"] and not row["version"].startswith(PACKAGE)


def _named(candidate: str) -> Keep:
    return lambda row: row["candidate"].startswith(candidate)


def worst(
    column: str, op: str, what: str, keep: Keep = _any, of: Keep = _is_ours, pick: Callable[..., float | None] = min
) -> Reached:
    """The worst value of a column, by default of our own rows. ``pick`` is max if less is better."""

    def reached(rows: list[RowDict]) -> float | None:
        values = (row[column] for row in _matching(rows, op, what, keep) if of(row))
        return pick((value for value in values if value is not None), default=None)

    return reached


def over(baseline: str, op: str, what: str, keep: Keep = _any) -> Reached:
    """How many times faster ours is than the baseline whose name starts like this."""
    return worst("times_ours", op, what, keep, _named(baseline))


def over_copies(L: int, S: int) -> Reached:
    """How many times faster branches of one prompt are than copies of the prompt, forward or with backward."""

    def keep(row: RowDict) -> bool:
        return row["grid"] in ("headline", "prompt") and (row["sizes"]["L"], row["sizes"]["S"]) == (L, S)

    parts = [over(COPIES, BRANCHES, what, keep) for what in (FORWARD, BOTH)]
    return lambda rows: min((part for of in parts if (part := of(rows))), default=None)


def of_arithmetic(grid: str) -> Reached:
    """How many times faster branches are than copies, as a part of how many times more arithmetic copies take."""

    def reached(rows: list[RowDict]) -> float | None:
        mine = [row for row in rows if row["op"] == BRANCHES and row["grid"] == grid and row["candidate"] == COPIES]
        timed = [row for row in mine if row["times_ours"]]
        return min((row["times_ours"] / BranchCase(grid=grid, **row["sizes"]).arithmetic for row in timed), default=None)

    return reached


def over_pairs(baseline: str) -> Reached:
    """Time of trees over that of baselines whose names start like this, divided by the same ratio of pairs of query and key."""

    def reached(rows: list[RowDict]) -> float | None:
        found = [
            trees.times_the_pairs(trees.TreeCase(grid=row["grid"], what=row["what"], **row["sizes"]), candidate)
            / row["times_ours"]
            for row in rows
            for candidate in trees.BASELINES
            if row["op"] == "trees"
            and row["times_ours"]
            and row["candidate"] == candidate.name
            and candidate.name.startswith(baseline)
        ]
        return max(found, default=None)

    return reached


def of_text_rate(rows: list[RowDict]) -> float | None:
    """Useful FLOP/s with branches of 1,024 rows, as a part of those with small thoughts on long texts."""
    long = worst("flops_rate", BRANCHES, FORWARD, lambda row: row["sizes"]["S"] == 1024)(rows)
    text = worst("flops_rate", ATTENTION, FORWARD, _LONG)(rows)
    return long / text if long and text else None


def beside(what: str) -> Reached:
    """How much longer the attention's forward takes beside something else."""
    return worst("times_ours", ATTENTION, FORWARD, of=_named(what), pick=max)


def host_time(what: str) -> Reached:
    """Seconds that a call takes the host."""
    return worst("seconds", "host", what, pick=max)


def over_partial(op: str, what: str, keep: Keep) -> Reached:
    """Our time divided by that of the candidate that does only a part of the work."""
    ratio = worst("times_ours", op, what, keep, lambda row: row["is_partial"])
    return lambda rows: 1 / least if (least := ratio(rows)) else None


def backward_rate(keep: Keep) -> Reached:
    """Useful FLOP/s of the attention's backward alone: the difference between forward with backward and forward."""

    def reached(rows: list[RowDict]) -> float | None:
        forward = {str(row["sizes"]): row for row in _matching(rows, ATTENTION, FORWARD, keep) if _is_ours(row)}
        rates = []
        for row in _matching(rows, ATTENTION, BOTH, keep):
            if _is_ours(row) and (first := forward.get(str(row["sizes"]))):
                flops = row["flops_rate"] * row["seconds"] - first["flops_rate"] * first["seconds"]
                rates.append(flops / (row["seconds"] - first["seconds"]))
        return min(rates, default=None)

    return reached


def branches_over_copies(*sizes: tuple[int, int, float]) -> list[Goal]:
    """A goal for each (L, S, target) with eight branches."""
    what = "branches, prompt {}, 8 of {}, speedup over repeated prompts"
    return [Goal(what.format(L, S), target, over_copies(L, S)) for L, S, target in sizes]


def backward_over(baseline: str, keep: Keep) -> Reached:
    """How many times faster the backward alone is than a baseline's."""

    def seconds(rows: list[RowDict], of: Keep) -> dict[str, float]:
        forward = {str(row["sizes"]): row["seconds"] for row in _matching(rows, ATTENTION, FORWARD, keep) if of(row)}
        both = {str(row["sizes"]): row["seconds"] for row in _matching(rows, ATTENTION, BOTH, keep) if of(row)}
        return {sizes: both[sizes] - forward[sizes] for sizes in both.keys() & forward.keys()}

    def reached(rows: list[RowDict]) -> float | None:
        mine, theirs = seconds(rows, _is_ours), seconds(rows, _named(baseline))
        return min((theirs[sizes] / mine[sizes] for sizes in mine.keys() & theirs.keys()), default=None)

    return reached


def in_bf16(rows: list[RowDict]) -> float | None:
    """How many times faster the attention's forward is in bf16 than in fp32."""
    halves, floats = (
        worst("seconds", ATTENTION, FORWARD, lambda row, grid=grid: row["grid"] == grid)(rows) for grid in ("bf16", "headline")
    )
    return floats / halves if halves and floats else None


_LOGPROB = partial(worst, op="linear_logprob", what=BOTH, keep=_headline, pick=max)
_STEP_SHARE = worst("of_roofline", "step", "training step", _eight_billion)

HOST = [
    Goal(
        "host time, attention forward + backward", 150e-6, host_time("attention forward+backward"), units.seconds, at_most=True
    ),
    Goal("host time, decode", 30e-6, host_time("decode"), units.seconds, at_most=True),
    Goal("host time, sample_token", 30e-6, host_time("sample_token"), units.seconds, at_most=True),
]
GPU = [
    Goal("decode step, speedup over the fastest baseline", 2, worst("times_ours", DECODE, FORWARD, _headline, is_rival)),
    Goal("decode step, share of the roofline", 0.7, worst("of_roofline", DECODE, FORWARD, _headline), units.percent),
    # Of causal texts of this length FlashAttention-3 has 560 and 316 on an H100 (meta-pytorch/tritonbench#1267).
    Goal("attention forward, L 2048, useful FLOP/s", 500e12, worst("flops_rate", ATTENTION, FORWARD, _2048), units.flops),
    Goal("attention backward, L 2048, useful FLOP/s", 350e12, backward_rate(_2048), units.flops),
    Goal("attention forward, L >= 2048, speedup over FlexAttention", 1.8, over(FLEX, ATTENTION, FORWARD, _LONG)),
    Goal("attention forward, L >= 2048, speedup over FlexAttention FLASH", 1.25, over(FLASH, ATTENTION, FORWARD, _LONG)),
    Goal("attention forward, L <= 512, speedup over FlexAttention", 3, over(FLEX, ATTENTION, FORWARD, _SHORT)),
    Goal("branches of 1024 rows, share of the FLOP/s on long texts", 0.9, of_text_rate, units.percent),
    *branches_over_copies((512, 256, 1.5), (2048, 256, 2.6)),
    Goal("branches, drafter forward, speedup over FlexAttention", 2, over(FLEX, BRANCHES, FORWARD, _drafter)),
    Goal("branches, drafter forward, speedup over FlexAttention FLASH", 1.2, over(FLASH, BRANCHES, FORWARD, _drafter)),
    Goal("attention backward, speedup over FlexAttention", 1.5, backward_over(FLEX, _ALL)),
    Goal(
        "sample_token, R >= 256, time over the matmul's",
        1.12,
        over_partial("sample_token", FORWARD, _many_draws),
        at_most=True,
    ),
    # huggingface/trl#7244 asks for 60 to 80 ms and about 6 GiB on an H100.
    Goal("linear_logprob, 8192 x 4096 x 152k, time", 0.05, _LOGPROB("seconds"), units.seconds, at_most=True),
    Goal("linear_logprob, 8192 x 4096 x 152k, memory", 6 * 2**30, _LOGPROB("peak_bytes"), units.memory, at_most=True),
    Goal("training step, Llama 8B class, share of the roofline", 0.6, _STEP_SHARE, units.percent),
    Goal("thoughts at all positions, speedup over naive sampling", 100, over("naive", "naive", "thoughts", _headline)),
]
CPU = [
    Goal("attention forward, share of the roofline", 0.7, worst("of_roofline", ATTENTION, FORWARD, _headline), units.percent),
    Goal("attention forward, bf16 over fp32, where the processor multiplies bf16", 1.6, in_bf16),
    Goal("attention forward, speedup over compiled FlexAttention", 2.5, over(FLEX, ATTENTION, FORWARD)),
    Goal("attention forward, L >= 256, speedup over dense SDPA", 15, over(DENSE, ATTENTION, FORWARD, _from_256)),
    Goal("attention forward, speedup over flash prefix + own block", 2.5, over(PREFIX, ATTENTION, FORWARD, _headline)),
    Goal(
        "attention forward + backward, share of the roofline",
        0.65,
        worst("of_roofline", ATTENTION, BOTH, _headline),
        units.percent,
    ),
    Goal("attention forward + backward, speedup over flash prefix + own block", 2, over(PREFIX, ATTENTION, BOTH, _headline)),
    Goal("attention forward + backward, L >= 256, speedup over dense SDPA", 30, over(DENSE, ATTENTION, BOTH, _from_256)),
    Goal("attention forward, L 64, speedup over flash prefix + own block", 2, over(PREFIX, ATTENTION, FORWARD, _at(_is_64))),
    Goal("attention forward, a busy neighbour, time over idle time", 2.2, beside("one busy neighbour"), at_most=True),
    Goal("decode step, share of the roofline", 0.55, worst("of_roofline", DECODE, FORWARD, _headline), units.percent),
    Goal("decode step, speedup over the fastest baseline", 2.5, worst("times_ours", DECODE, FORWARD, _headline, is_rival)),
    Goal("rollout, speedup over the published schedule", 2, over("published schedule", "step", "rollout", _headline)),
    Goal(
        "training step, speedup over the published schedule",
        3,
        over("published schedule", "step", "training step", _headline),
    ),
    Goal("sample_token, speedup over matmul, softmax, multinomial", 6, over(SOFTMAX, "sample_token", FORWARD, _headline)),
    Goal("linear_logprob, speedup over matmul, cross_entropy", 1.8, over("matmul, cross_entropy", "linear_logprob", BOTH)),
    Goal("a step of group RL, speedup over TRL's repeated prompts", 1.8, over("TRL", "group_rl", "loss and backward")),
    Goal("a step of RLP, speedup over a loop over anchors", 5, over("anchor by anchor", "online", "step", _headline)),
    Goal("a step of RLP, speedup over a sequence for each thought", 3, over("a sequence", "online", "step", _headline)),
    *branches_over_copies((512, 64, 2.5), (512, 256, 1.4), (2048, 256, 2.6), (2048, 1024, 1.45), (512, 1024, 0.95)),
    Goal("branches, 16 prompts, speedup over copies of the arithmetic's", 0.85, of_arithmetic("prompts"), units.percent),
    Goal("branches, drafter forward, speedup over compiled FlexAttention", 1.5, over(FLEX, BRANCHES, FORWARD, _drafter)),
    Goal("branches, drafter forward + backward, speedup over dense SDPA", 5, over(DENSE, BRANCHES, BOTH, _drafter)),
    *(
        Goal(f"trees, time over {name}, by the ratio of pairs", 1.1, over_pairs(name), at_most=True)
        for name in (trees.SEQUENCES, trees.PATHS)
    ),
    Goal("thoughts at all positions, speedup over naive sampling", 20, over("naive", "naive", "thoughts", _headline)),
    Goal("thoughts at all positions, speedup over careful naive sampling", 10, over("careful", "naive", "thoughts", _headline)),
]


def of(kind: str) -> list[Goal]:
    """The goals for "cuda" or "cpu"."""
    return [*(GPU if kind == "cuda" else CPU), *HOST]
