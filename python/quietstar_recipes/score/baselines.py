"""What SCoRe is compared with that needs no reinforcement: supervised examples from a model's own samples (arXiv 2409.12917).

Both baselines learn from what the model wrote before training, so from its mistakes of then. ``sft`` trains on the examples.
The others are options of ``score.Config``: single_turn, from_base=1 (first attempts are not the trained model's own, but the
base model's), first_steps=0 (no stage I) and bonus=0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from quietstar_recipes.common.sampling import rollout
from quietstar_recipes.common.solutions import revision_prompt
from quietstar_recipes.common.training import Example
from quietstar_recipes.score.attempts import attempt
from quietstar_recipes.tasks import Row, Task


def paired(
    model: PreTrainedModel, task: Task, rows: Sequence[Row], samples: int, sampling: dict[str, Any], seed: int
) -> list[Example]:
    """Pair-SFT: a wrong attempt and the request to look again, followed by a right attempt at the same problem.

    Both are among ``samples`` independent first attempts, and each is in one pair at most (after arXiv 2211.00053).

    Args:
        rows: problems to attempt.
        sampling: the arguments of ``rollout``, except the seed.
    """
    examples: list[Example] = []
    written = rollout(model, task, [row.prompt_ids for row in rows], samples, **sampling, seed=seed)
    for row, completions in zip(rows, written, strict=True):
        right = [task.trimmed(x.ids) for x in completions if task.check(row, x.ids)]
        wrong = [task.trimmed(x.ids) for x in completions if not task.check(row, x.ids)]
        examples += [(revision_prompt(task, row, [first]), second) for first, second in zip(wrong, right, strict=False)]
    return examples


def corrected(
    model: PreTrainedModel, task: Task, rows: Sequence[Row], samples: int, sampling: dict[str, Any], seed: int
) -> list[Example]:
    """STaR on second attempts: those of the model that are right after a wrong first one.

    Args:
        rows: problems to attempt twice, ``samples`` times each.
        sampling: the arguments of ``rollout``, except the seed.
    """
    attempts = attempt(model, task, [row for row in rows for _ in range(samples)], sampling, seed)
    fixed = (attempts.rewards[1] > attempts.rewards[0]).tolist()
    turns = zip(attempts.requests, attempts.second, fixed, strict=True)
    return [(request, task.trimmed(second)) for request, second, keep in turns if keep]
