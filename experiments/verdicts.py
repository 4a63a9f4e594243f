"""The usual kind of verifier, with which V-STaR's is compared: it learns to say after a solution whether it is right."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar_recipes.common.logprobs import likelihoods, logprob
from quietstar_recipes.common.selectors import auc
from quietstar_recipes.common.solutions import Scorer
from quietstar_recipes.common.training import SFTConfig, fine_tune
from quietstar_recipes.tasks import Task
from quietstar_recipes.vstar.verifier import Solution


def train_outcome(
    reference: PreTrainedModel,
    task: Task,
    solutions: Sequence[Solution],
    steps: int,
    config: SFTConfig,
    seed: int,
) -> PreTrainedModel:
    """A copy of the reference model that has learnt to say after a solution whether it is right.

    The loss is the cross entropy of the verdict and, beside it, of the right solutions as in language modelling (arXiv
    2402.06457, section 2.2; arXiv 2110.14168 has both, too). Such a verifier soon overfits: its AUC on the solutions of
    validation problems is measured ten times, and the best weights are kept. ``verdict_scorer`` scores with it.

    Args:
        solutions: of training and validation problems; without any of the latter the last weights are kept.
    """
    examples = [x for x in solutions if x["split"] == "train"]
    held_out = [x for x in solutions if x["split"] == "valid"]
    verifier = copy.deepcopy(reference).train()
    best, best_auc = verifier, -1.0

    def loss_of(trained: PreTrainedModel, chosen: Sequence[int]) -> tuple[Tensor, int]:
        return outcome_loss(trained, task, [examples[i] for i in chosen]), len(chosen)

    def keep_best(line: dict[str, Any]) -> None:
        nonlocal best, best_auc
        value = None if line["step"] % max(1, steps // 10) else outcome_auc(verifier, task, held_out)
        if value is not None and value > best_auc:
            best, best_auc = copy.deepcopy(verifier), value

    fine_tune(verifier, [len(x["prompt"]) + len(x["ids"]) + 1 for x in examples], loss_of, steps, config, seed, keep_best)
    return best.eval()


def outcome_loss(verifier: PreTrainedModel, task: Task, batch: Sequence[Solution]) -> Tensor:
    """Cross entropy of the verdicts, in nats per solution, plus that of right solutions, in nats per token."""
    verdicts = [verdict(task, x["right"]) for x in batch]
    completions = [x["ids"] + ids for x, ids in zip(batch, verdicts, strict=True)]
    values, mask = logprob(verifier, [x["prompt"] for x in batch], completions)
    written = torch.tensor([len(x["ids"]) for x in batch], device=mask.device)[:, None]
    is_text = torch.arange(mask.shape[1], device=mask.device) < written
    right_text = is_text & torch.tensor([x["right"] for x in batch], device=mask.device)[:, None]
    language = -values[right_text].sum() / right_text.sum().clamp(min=1)
    return -values[mask & ~is_text].sum() / len(batch) + language


def outcome_auc(verifier: PreTrainedModel, task: Task, solutions: Sequence[Solution]) -> float | None:
    """How often the verdict prefers a right solution to a wrong one of its problem; None without such pairs."""
    yes = verdict(task, True)
    scores = likelihoods(verifier, [x["prompt"] + x["ids"] for x in solutions], [yes] * len(solutions))
    by_prompt: defaultdict[tuple[int, ...], tuple[list[float], list[bool]]] = defaultdict(lambda: ([], []))
    for x, value in zip(solutions, scores, strict=True):
        values, right = by_prompt[tuple(x["prompt"])]
        values.append(value)
        right.append(x["right"])
    return auc([values for values, _ in by_prompt.values()], [right for _, right in by_prompt.values()])


def verdict(task: Task, right: bool) -> list[int]:
    """The verdict after a solution, 1 or 0, in the tokens of the task; the small tokenizers have digits."""
    return task.tokenizer(f" {int(right)}", add_special_tokens=False)["input_ids"]


def verdict_scorer(verifier: PreTrainedModel, task: Task, batch_size: int = 256) -> Scorer:
    """Scores a solution by the log-probability of the verdict that it is right."""
    yes = verdict(task, True)
    return lambda rows, solutions: likelihoods(
        verifier, [row.prompt_ids + ids for row, ids in zip(rows, solutions, strict=True)], [yes] * len(solutions), batch_size
    )
