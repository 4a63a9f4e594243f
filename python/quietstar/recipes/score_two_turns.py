"""The warm-up of SCoRe: a model that has never been asked again learns that another attempt follows (arXiv 2409.12917)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from quietstar.recipes.common.sampling import rollout
from quietstar.recipes.common.sft import SFTConfig, sft
from quietstar.recipes.common.solutions import revision_prompt
from quietstar.recipes.tasks import Task
from quietstar.run.batches import mix_seed


def learn_two_turns(
    model: PreTrainedModel,
    task: Task,
    problems: int,
    steps: int,
    learning_rate: float,
    sampling: dict[str, Any],
    seed: int,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
) -> None:
    """Teach the model that a request for another attempt is followed by the same attempt, or by the data's own solution.

    First attempts stay as they were, since they are the model's own: with right ones instead, little is left to correct.

    Args:
        model: changed in place.
        problems: training problems with chains, of which it samples a first attempt each.
        sampling: the arguments of ``rollout``, except the seed.
        log: called with the figures of every update.

    Raises:
        ValueError: no problem has a chain.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, 2000))
    rows = task.sample_with_chain(problems, generator)
    if not rows:
        raise ValueError("score: two_turn_steps needs problems with chains, but the data have none")
    first = [task.trimmed(x[0].ids) for x in rollout(model, task, [row.prompt_ids for row in rows], **sampling, seed=seed)]
    copies = (torch.rand(len(rows), generator=generator) < 0.5).tolist()
    once = [(row.prompt_ids, ids) for row, ids in zip(rows, first, strict=True)]
    again = [
        (revision_prompt(task, row, [ids]), ids if same else task.completion_ids(row))
        for row, ids, same in zip(rows, first, copies, strict=True)
    ]
    sft(model, once + again, steps, SFTConfig(learning_rate=learning_rate), seed, log)
