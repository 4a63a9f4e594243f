"""Verifiers that value a solution, or the beginning of one: how likely is it that the model, going on from there, ends right?

A process verifier learns the value of each step from rollouts (Math-Shepherd, arXiv 2312.08935; arXiv 2408.03314, section 5.1
and appendix D), an outcome verifier that of whole solutions alone. The log-odds of a value have two parts: the log-likelihood
of all tokens so far, for whether there is a mistake in them, and what the language model's head says after the last one, for
what is still to come. Without the first part, a model of two layers learnt nothing: to judge a step from its last token, it
would have to predict each token, compare it with the one that is there, and gather the results, one layer after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, pad
from transformers import PreTrainedModel

from quietstar.hf.modules import dropout_off
from quietstar.run.batches import mix_seed
from quietstar_recipes.common.branches import Ids
from quietstar_recipes.common.logprobs import batches, completion_logits
from quietstar_recipes.common.sampling import Sampling, rollout
from quietstar_recipes.common.solutions import Scorer
from quietstar_recipes.common.training import SFTConfig, fine_tune
from quietstar_recipes.tasks import Row, Task

CHECKS = 10  # how often the held-out loss is measured in a training


@dataclass(frozen=True)
class Valued:
    """A solution to learn from."""

    problem: int  # its number
    prompt: list[int]  # ids; with earlier attempts, where these are to be seen
    ids: list[int]  # of the solution
    ends: list[int]  # lengths of the beginnings that have a value
    values: list[float]  # of each of them, from 0 to 1


def roll_out(
    model: PreTrainedModel, task: Task, rows: Sequence[Row], samples: int, rollouts: int, sampling: Sampling
) -> list[Valued]:
    """Solutions of each row, with the value of each step: the share of rollouts from there that end right.

    Solutions without an answer that can be read are left out, as in the paper.

    Args:
        samples: solutions to draw of each row; 16 in the paper.
        rollouts: from each step; 16 in the paper. The last step needs none: there, the value is 1 or 0.
    """
    prompts = [row.prompt_ids for row in rows]
    written = rollout(model, task, prompts, samples, seed=mix_seed(sampling.seed, 0), **sampling.sampling)
    solutions = [
        (i, tuple(task.trimmed(x.ids))) for i, row in enumerate(rows) for x in written[i] if task.answer(row, x.ids) is not None
    ]
    # Equal beginnings of one row's solutions share their rollouts.
    begun = sorted({(i, ids[:end]) for i, ids in solutions for end in task.step_ends(ids)[:-1]})
    prompts = [prompts[i] + list(ids) for i, ids in begun]
    finished = rollout(model, task, prompts, rollouts, seed=mix_seed(sampling.seed, 1), **sampling.sampling)
    share = {
        (i, ids): sum(task.check(rows[i], [*ids, *x.ids]) for x in several) / rollouts
        for (i, ids), several in zip(begun, finished, strict=True)
    }
    found = []
    for i, ids in solutions:
        ends = task.step_ends(ids)
        known = [share[i, ids[:end]] for end in ends[:-1]]
        found.append(Valued(i, rows[i].prompt_ids, list(ids), ends, [*known, float(task.check(rows[i], ids))]))
    return found


def outcomes(solutions: Sequence[Valued]) -> list[Valued]:
    """The same solutions with the last value alone: what an outcome verifier learns from."""
    return [replace(x, ends=x.ends[-1:], values=x.values[-1:]) for x in solutions]


def train_values(
    model: PreTrainedModel, task: Task, solutions: Sequence[Valued], steps: int, config: SFTConfig, seed: int
) -> tuple[PreTrainedModel, list[float]]:
    """A copy of the model that has learnt the values by cross entropy, and its losses on held-out solutions.

    Every tenth problem is held out. The weights are those with the lowest held-out loss, which is measured ten times
    (arXiv 2408.03314, appendix D).
    """
    held_out = [x for x in solutions if x.problem % 10 == 0]
    shown = [x for x in solutions if x.problem % 10]
    if not (held_out and shown):
        raise ValueError(f"solve: a verifier needs solutions of more problems: {len(shown)} to train, {len(held_out)} held out")
    verifier = copy.deepcopy(model)
    losses: list[float] = []
    best: list[Tensor] = []

    def loss_of(trained: PreTrainedModel, chosen: Sequence[int]) -> tuple[Tensor, int]:
        wanted = [shown[i] for i in chosen]
        return cross_entropy(trained, task, wanted).mean(), sum(len(x.ends) for x in wanted)

    def keep_best(line: dict[str, Any]) -> None:
        if line["step"] % max(1, steps // CHECKS) and line["step"] < steps:
            return
        weights = [p for p in verifier.parameters() if p.requires_grad]
        losses.append(held_out_loss(verifier, task, held_out))
        if losses[-1] == min(losses):
            best[:] = [p.detach().clone() for p in weights]
        if line["step"] == steps:
            for p, value in zip(weights, best, strict=True):
                p.data.copy_(value)

    verifier = fine_tune(verifier, [len(x.prompt) + len(x.ids) for x in shown], loss_of, steps, config, seed, keep_best)
    return verifier.eval(), losses


def cross_entropy(verifier: PreTrainedModel, task: Task, solutions: Sequence[Valued]) -> Tensor:
    """Of the verifier's values with those to learn, in nats, for every step of the solutions."""
    logits = value_logits(verifier, task, [x.prompt for x in solutions], [x.ids for x in solutions])
    rows = [i for i, x in enumerate(solutions) for _ in x.ends]
    columns = [end for x in solutions for end in x.ends]
    wanted = torch.tensor([value for x in solutions for value in x.values], device=logits.device)
    return binary_cross_entropy_with_logits(logits[rows, columns], wanted, reduction="none")


@torch.no_grad()
def held_out_loss(verifier: PreTrainedModel, task: Task, solutions: Sequence[Valued], batch_size: int = 256) -> float:
    """The mean cross entropy."""
    with dropout_off(verifier):
        parts = [solutions[start : start + batch_size] for start in range(0, len(solutions), batch_size)]
        return float(torch.cat([cross_entropy(verifier, task, batch) for batch in parts]).mean())


def value_logits(verifier: PreTrainedModel, task: Task, prompts: Ids, solutions: Ids) -> Tensor:
    """The log-odds of a right end [R,T+1], after each number of a solution's tokens."""
    logits, ids, mask = completion_logits(verifier, prompts, solutions)
    tokens = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0].where(mask, 0)
    # Two tokens that don't follow a step, so that their logits are free to say something else.
    verdict = logits[..., task.again_ids[0]] - logits[..., task.end_id]
    return pad(tokens.cumsum(1), (1, 0)) + verdict


@torch.no_grad()
def values(verifier: PreTrainedModel, task: Task, prompts: Ids, begun: Ids, batch_size: int = 256) -> list[float]:
    """The log-probability that each solution, whole or only begun, ends right."""
    found = [0.0] * len(begun)
    with dropout_off(verifier):
        for chosen in batches(verifier, prompts, begun, batch_size):
            logits = value_logits(verifier, task, [prompts[i] for i in chosen], [begun[i] for i in chosen])
            for i, row in zip(chosen, logsigmoid(logits), strict=True):
                found[i] = float(row[len(begun[i])])
    return found


def value_scorer(verifier: PreTrainedModel, task: Task, batch_size: int = 256) -> Scorer:
    """Scores a solution by its value after the last step, which the paper found best (appendix E)."""
    return lambda rows, solutions: values(verifier, task, [row.prompt_ids for row in rows], solutions, batch_size)
