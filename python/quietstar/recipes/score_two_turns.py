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
    """Teach the model that a request for another attempt is followed by another attempt.

    Both attempts are the model's own, drawn independently of each other. So it still makes the mistakes that are to be
    corrected, and its second attempts take no notice of the first: they break right answers as often as they fix wrong ones.
    Like a model that was never trained to correct itself, it gains nothing from being asked again.

    Args:
        model: changed in place.
        problems: training problems, at which it makes two attempts each.
        sampling: the arguments of ``rollout``, except the seed.
        log: called with the figures of every update.
    """
    rows = task.sample(problems, "train", torch.Generator().manual_seed(mix_seed(seed, 2000)))
    pairs = rollout(model, task, [row.prompt_ids for row in rows], 2, **sampling, seed=seed)
    examples = []
    for row, pair in zip(rows, pairs, strict=True):
        first, second = (task.trimmed(completion.ids) for completion in pair)
        examples += [(row.prompt_ids, first), (revision_prompt(task, row, [first]), second)]
    sft(model, examples, steps, SFTConfig(learning_rate=learning_rate), seed, log)
