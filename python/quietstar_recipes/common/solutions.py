"""Solutions as the selectors see them, a verifier's scores of them, and prompts that ask for a revision of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from quietstar_recipes.common.logprobs import likelihoods
from quietstar_recipes.common.sampling import Solutions
from quietstar_recipes.common.selectors import Sample
from quietstar_recipes.tasks import Row, Task

VISIBLE_ATTEMPTS = 4  # earlier attempts that a revision sees at most, as in arXiv 2408.03314
Scorer = Callable[[Sequence[Row], Sequence[list[int]]], list[float]]  # from rows and their solutions to a verifier's scores


def to_samples(task: Task, rows: Sequence[Row], written: Solutions, scorer: Scorer | None = None) -> list[list[Sample]]:
    """What the selectors need to know about each solution."""
    flat = [(row, x) for row, solutions in zip(rows, written, strict=True) for x in solutions]
    scores: Sequence[float | None] = [None] * len(flat)
    if scorer:
        scores = scorer([row for row, _ in flat], [task.trimmed(x.ids) for _, x in flat])
    samples = iter(
        Sample(answer := task.answer(row, x.ids), answer == row.problem.right, len(x.ids), sum(x.logprob), score)
        for (row, x), score in zip(flat, scores, strict=True)
    )
    return [[next(samples) for _ in solutions] for solutions in written]


def likelihood_scorer(verifier: PreTrainedModel, batch_size: int = 256) -> Scorer:
    """Scores a solution by its log-probability under the verifier."""
    return lambda rows, solutions: likelihoods(verifier, [row.prompt_ids for row in rows], solutions, batch_size)


def revision_prompt(task: Task, row: Row, attempts: Sequence[list[int]]) -> list[int]:
    """The row's prompt and its latest attempts, each followed by the request for another one."""
    return row.prompt_ids + [x for ids in attempts[-VISIBLE_ATTEMPTS:] for x in ids + task.again_ids]
