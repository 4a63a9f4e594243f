"""The model that experiments start from: 2 x 2-digit multiplication, learnt from chains until about half is right."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from quietstar.recipes.common.evaluation import evaluate
from quietstar.recipes.common.models import small_model
from quietstar.recipes.common.sft import SFTConfig, sft
from quietstar.recipes.tasks import Multiplication, Task
from quietstar.run.batches import mix_seed

STEPS = {"tiny": 5, "quick": 200, "full": 200}
MORE, PIECE = 24, 25  # additional pieces of training at most, and updates in each
ENOUGH = 0.45  # share of held-out problems to solve; some seeds need twice the updates of others
HINTED = 0.3  # share of the rows that show the answer, so that the model can use a hint


def base(seed: int, size: str) -> tuple[PreTrainedModel, Task]:
    """A model of 0.4 million weights that solves about half of the problems, and the task."""
    task = Multiplication(2)
    model = small_model(task, seed=seed)
    generator = torch.Generator().manual_seed(mix_seed(seed, 1000))
    rows = task.sample(200 if size == "tiny" else 4000, "train", generator)
    hinted = (torch.rand(len(rows), generator=generator) < HINTED).tolist()
    examples = [
        (row.hinted_ids if hint else row.prompt_ids, task.completion_ids(row)) for row, hint in zip(rows, hinted, strict=True)
    ]
    sft(model, examples, STEPS[size], SFTConfig(learning_rate=1e-3, weight_decay=0.01), seed)
    held_out = task.sample(400, "valid", generator)
    for piece in range(MORE if size != "tiny" else 0):
        if evaluate(model, task, held_out, max_new=20)["accuracy"] >= ENOUGH:
            break
        sft(model, examples, PIECE, SFTConfig(learning_rate=1e-3, weight_decay=0.01, warmup=0), mix_seed(seed, piece))
    return model, task
