"""The goals that this package set itself, each computed from the rows of a run.

A goal about a ratio takes the worst case among the rows that it speaks of. One whose rows weren't measured has no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import units
from peers import PACKAGE

RowDict = dict[str, Any]
ATTENTION, DECODE = "thought_attention", "thought_decode"
FORWARD, BOTH = "forward", "forward+backward"
PREFIX = "flash prefix"  # the composition of existing parts


@dataclass(frozen=True)
class Goal:
    """``target`` is a lower bound, or an upper one; ``reached`` gives None where nothing was measured."""

    what: str
    target: float
    reached: Callable[[list[RowDict]], float | None]
    show: Callable[[float], str] = units.times
    at_most: bool = False

    def verdict(self, rows: list[RowDict]) -> tuple[str, str, str]:
        """The goal, what was reached, and pass, miss or not measured."""
        goal = f"{'<=' if self.at_most else '>='} {self.show(self.target)}"
        got = self.reached(rows)
        if got is None:
            return goal, "", "not measured"
        return goal, self.show(got), "pass" if (got <= self.target if self.at_most else got >= self.target) else "miss"


def _matching(rows: list[RowDict], op: str, what: str, keep: Callable[[RowDict], bool]) -> Iterator[RowDict]:
    return (row for row in rows if row["op"] == op and row["what"] == what and row["seconds"] is not None and keep(row))


def _any(row: RowDict) -> bool:
    return True


def _headline(row: RowDict) -> bool:
    return row["grid"] == "headline"


def _at(test: Callable[[int], bool]) -> Callable[[RowDict], bool]:
    """Rows of lengths L that satisfy ``test``, at the other sizes of the headline."""
    return lambda row: row["grid"] in ("headline", "text") and test(row["sizes"]["L"])


def is_rival(row: RowDict) -> bool:
    """Somebody else's way to do all of the work; ours by another back end is none."""
    return not row["is_ours"] and not row["is_floor"] and not row["version"].startswith(PACKAGE)


def over(peer: str, op: str, what: str, keep: Callable[[RowDict], bool] = _any) -> Callable[[list[RowDict]], float | None]:
    """How many times faster ours is than the peer whose name starts so, at worst."""

    def reached(rows: list[RowDict]) -> float | None:
        ratios = [row["times_ours"] for row in _matching(rows, op, what, keep) if row["candidate"].startswith(peer)]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    return reached


def over_the_best(op: str, what: str, keep: Callable[[RowDict], bool]) -> Callable[[list[RowDict]], float | None]:
    """How many times faster ours is than the fastest peer, at worst."""

    def reached(rows: list[RowDict]) -> float | None:
        ratios = [row["times_ours"] for row in _matching(rows, op, what, keep) if is_rival(row)]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    return reached


def ours(
    column: str, op: str, what: str, keep: Callable[[RowDict], bool] = _any, worst: Callable[..., float | None] = min
) -> Callable[[list[RowDict]], float | None]:
    """A column of our own rows, its worst value."""

    def reached(rows: list[RowDict]) -> float | None:
        return worst((row[column] for row in _matching(rows, op, what, keep) if row["is_ours"]), default=None)

    return reached


def with_logits_kept(column: str) -> Callable[[list[RowDict]], float | None]:
    """A column of linear_logprob's headline case where the forward keeps its logits, which is not the default at that size."""

    def reached(rows: list[RowDict]) -> float | None:
        headline = _matching(rows, "linear_logprob", BOTH, _headline)
        return next((row[column] for row in headline if row["candidate"] == "linear_logprob, logits kept"), None)

    return reached


def over_floor(op: str, what: str, keep: Callable[[RowDict], bool]) -> Callable[[list[RowDict]], float | None]:
    """Our seconds over those of the candidate that does only a part of the work, at worst."""

    def reached(rows: list[RowDict]) -> float | None:
        ratios = [row["times_ours"] for row in _matching(rows, op, what, keep) if row["is_floor"]]
        return max((1 / ratio for ratio in ratios if ratio), default=None)

    return reached


def backward_rate(keep: Callable[[RowDict], bool]) -> Callable[[list[RowDict]], float | None]:
    """Useful FLOP/s of the attention's backward alone: what forward and backward take more than the forward, at worst."""

    def reached(rows: list[RowDict]) -> float | None:
        forward = {str(row["sizes"]): row for row in _matching(rows, ATTENTION, FORWARD, keep) if row["is_ours"]}
        rates = []
        for row in _matching(rows, ATTENTION, BOTH, keep):
            if row["is_ours"] and (first := forward.get(str(row["sizes"]))):
                flops = row["flops_rate"] * row["seconds"] - first["flops_rate"] * first["seconds"]
                rates.append(flops / (row["seconds"] - first["seconds"]))
        return min(rates, default=None)

    return reached


def backward_over(peer: str, keep: Callable[[RowDict], bool]) -> Callable[[list[RowDict]], float | None]:
    """How many times faster the backward alone is than a peer's, at worst."""

    def seconds(rows: list[RowDict], wanted: Callable[[RowDict], bool]) -> dict[str, float]:
        forward = {str(row["sizes"]): row["seconds"] for row in _matching(rows, ATTENTION, FORWARD, keep) if wanted(row)}
        both = {str(row["sizes"]): row["seconds"] for row in _matching(rows, ATTENTION, BOTH, keep) if wanted(row)}
        return {sizes: both[sizes] - forward[sizes] for sizes in both.keys() & forward.keys()}

    def reached(rows: list[RowDict]) -> float | None:
        mine = seconds(rows, lambda row: row["is_ours"])
        theirs = seconds(rows, lambda row: row["candidate"].startswith(peer))
        return min((theirs[sizes] / mine[sizes] for sizes in mine.keys() & theirs.keys()), default=None)

    return reached


FLEX, FLASH, DENSE = "FlexAttention, compiled", "FlexAttention, FLASH", "SDPA, dense mask"

_LONG, _SHORT, _ALL = _at(lambda L: L >= 2048), _at(lambda L: L <= 512), _at(lambda L: True)


def _from_256(row: RowDict) -> bool:
    return row["sizes"]["L"] >= 256


def _many_draws(row: RowDict) -> bool:
    return row["sizes"]["R"] >= 256


def _eight_billion(row: RowDict) -> bool:
    return "8B" in row["grid"]


_STEP_SHARE = ours("of_floor", "step", "training step", _eight_billion)


def host_time(what: str) -> Callable[[list[RowDict]], float | None]:
    """Seconds that a call takes the host."""
    return ours("seconds", "host", what, worst=max)


HOST = [
    Goal(
        "host time, attention forward + backward", 150e-6, host_time("attention forward+backward"), units.seconds, at_most=True
    ),
    Goal("host time, decode", 30e-6, host_time("decode"), units.seconds, at_most=True),
    Goal("host time, sample_token", 30e-6, host_time("sample_token"), units.seconds, at_most=True),
]
GPU = [
    Goal("decode step over the best composition of existing parts", 2, over_the_best(DECODE, FORWARD, _headline)),
    Goal("decode step, share of the floor", 0.7, ours("of_floor", DECODE, FORWARD, _headline), units.percent),
    Goal("attention forward, L >= 2048, useful", 620e12, ours("flops_rate", ATTENTION, FORWARD, _LONG), units.flops),
    Goal("attention forward, L >= 2048, over FlexAttention", 1.8, over(FLEX, ATTENTION, FORWARD, _LONG)),
    Goal("attention forward, L >= 2048, over FlexAttention FLASH", 1.25, over(FLASH, ATTENTION, FORWARD, _LONG)),
    Goal("attention forward, L <= 512, over FlexAttention", 3, over(FLEX, ATTENTION, FORWARD, _SHORT)),
    Goal("attention backward over FlexAttention", 1.5, backward_over(FLEX, _ALL)),
    Goal("attention backward, L >= 2048, useful", 380e12, backward_rate(_LONG), units.flops),
    Goal("sample_token, R >= 256, over the bare matmul", 1.12, over_floor("sample_token", FORWARD, _many_draws), at_most=True),
    # TRL's issue 7244 asks for 60 to 80 ms at about 6 GiB, on an H100.
    Goal("linear_logprob, 8192 x 4096 x 152k", 0.05, with_logits_kept("seconds"), units.seconds, at_most=True),
    Goal("linear_logprob, 8192 x 4096 x 152k, memory", 6 * 2**30, with_logits_kept("peak_bytes"), units.memory, at_most=True),
    Goal("training step, Llama 8B class, share of its FLOP floor", 0.6, _STEP_SHARE, units.percent),
    Goal("all positions at once over naive sampling", 100, over("naive", "naive", "thoughts", _headline)),
]
CPU = [
    Goal("attention forward over compiled FlexAttention", 1.3, over(FLEX, ATTENTION, FORWARD)),
    Goal("attention forward over SDPA, dense mask, L >= 256", 15, over(DENSE, ATTENTION, FORWARD, _from_256)),
    Goal("attention forward + backward over SDPA, dense mask, L >= 256", 25, over(DENSE, ATTENTION, BOTH, _from_256)),
    Goal("all positions at once over naive sampling", 20, over("naive", "naive", "thoughts", _headline)),
    Goal("all positions at once over careful naive sampling", 10, over("careful", "naive", "thoughts", _headline)),
]


def of(kind: str) -> list[Goal]:
    """The goals for "cuda" or "cpu"."""
    return [*(GPU if kind == "cuda" else CPU), *HOST]
