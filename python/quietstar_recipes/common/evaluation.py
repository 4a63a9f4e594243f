"""How many problems a model solves, and how many tokens and how much time it takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from quietstar.evaluation.intervals import wilson
from quietstar_recipes.common.branches import Ids
from quietstar_recipes.common.sampling import Completion, Sampling, rollout
from quietstar_recipes.tasks import Row, Task


def evaluate(
    model: PreTrainedModel,
    task: Task,
    rows: Sequence[Row],
    max_new: int = 64,
    prompts: Ids | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Grade greedy answers to the rows' prompts, or to ``prompts``, ``batch_size`` of them at once.

    Returns:
        What ``grade`` returns, with tokens, the mean number generated per problem, and problems_per_second.
    """
    began = time.perf_counter()
    prompts = [row.prompt_ids for row in rows] if prompts is None else prompts
    written = [x for (x,) in rollout(model, task, prompts, temperature=0, max_new=max_new, batch_size=batch_size)]
    seconds = time.perf_counter() - began
    tokens = sum(len(x.ids) for x in written) / len(rows)
    return {**grade(task, rows, written), "tokens": tokens, "problems_per_second": len(rows) / seconds}


def measure(
    model: PreTrainedModel, task: Task, test: Sequence[Row], valid: Sequence[Row], config: Sampling, before: Sequence[int] = ()
) -> dict[str, Any]:
    """What ``evaluate`` returns on test problems, and valid_accuracy, by which the best round is chosen.

    Args:
        before: ids to put before each prompt, such as a few solved problems.
    """
    on_test, on_valid = (
        evaluate(model, task, rows, config.max_new, [[*before, *row.prompt_ids] for row in rows], config.batch_size)
        for rows in (test, valid)
    )
    return {**on_test, "valid_accuracy": on_valid["accuracy"]}


def grade(task: Task, rows: Sequence[Row], written: Sequence[Completion]) -> dict[str, Any]:
    """problems, right, accuracy with its 95 % interval (low, high), by_kind and chain_right.

    by_kind has the accuracy of each kind of problem and is empty where the task has one kind. chain_right is the share of right
    chains among the right answers; None where the task can't check chains.
    """
    solved = [(row, x.ids) for row, x in zip(rows, written, strict=True) if task.check(row, x.ids)]
    low, high = wilson(len(solved), len(rows))
    asked, right = (Counter(row.problem.kind for row in several) for several in (rows, [row for row, _ in solved]))
    return {
        "problems": len(rows),
        "right": len(solved),
        "accuracy": len(solved) / len(rows),
        "low": low,
        "high": high,
        "by_kind": {kind: right[kind] / n for kind, n in sorted(asked.items()) if kind},
        "chain_right": share_of_right_chains(task, solved),
    }


def share_of_right_chains(task: Task, written: Sequence[tuple[Row, list[int]]]) -> float | None:
    """The share of right chains; None if ``written`` is empty or the task can't check chains."""
    right = [task.check_chain(row, ids) for row, ids in written]
    return None if not right or None in right else sum(map(bool, right)) / len(right)


def nothing_solved(task: Task, rows: Sequence[Row], written: Sequence[list[int]]) -> str:
    """The message for a batch without a right answer: how many answers could be read, and an example."""
    read = [i for i, (row, ids) in enumerate(zip(rows, written, strict=True)) if task.answer(row, ids) is not None]
    example = read[0] if read else 0
    return (
        f"none of the first {len(rows)} problems is solved, so there is nothing to learn from: {len(read)} have an answer that "
        f"can be read; where {rows[example].problem.right!r} is right, the model wrote {task.text(written[example])[-80:]!r}"
    )
