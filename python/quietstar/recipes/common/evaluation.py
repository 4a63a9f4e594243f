"""How many problems a model solves, and what it spends on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from quietstar.evaluation.intervals import wilson
from quietstar.recipes.common.sampling import Completion, rollout
from quietstar.recipes.tasks import Row, Task


def evaluate(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    max_new: int = 64,
    prompts: Sequence[list[int]] | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Greedy answers to the rows' prompts, or to ``prompts``; ``batch_size`` at once.

    Returns:
        What ``grade`` returns, and tokens, the mean number generated a problem, and problems_per_second.
    """
    began = time.perf_counter()
    prompts = [row.prompt_ids for row in rows] if prompts is None else prompts
    options = {"temperature": 0, "max_new": max_new, "batch_size": batch_size}
    written = [several[0] for several in rollout(model, task, prompts, **options)]
    seconds = time.perf_counter() - began
    tokens = sum(len(x.ids) for x in written) / len(rows)
    return {**grade(task, rows, written), "tokens": tokens, "problems_per_second": len(rows) / seconds}


def grade(task: Task, rows: Sequence[Row], written: Sequence[Completion]) -> dict[str, Any]:
    """problems, right, accuracy with its 95 % interval, low and high, and chain_right.

    chain_right is the share of right chains among the right answers; None where the task can't tell.
    """
    solved = [(row, x.ids) for row, x in zip(rows, written, strict=True) if task.check(row, x.ids)]
    low, high = wilson(len(solved), len(rows))
    return {
        "problems": len(rows),
        "right": len(solved),
        "accuracy": len(solved) / len(rows),
        "low": low,
        "high": high,
        "chain_right": chains_right(task, solved),
    }


def chains_right(task: Task, written: Sequence[tuple[Row, list[int]]]) -> float | None:
    """The share of right chains; None where there is nothing or the task can't tell."""
    right = [task.check_chain(row, ids) for row, ids in written]
    return None if not right or None in right else sum(map(bool, right)) / len(right)
