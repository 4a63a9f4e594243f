"""A small model that solves some problems and not others, trained once."""

import pytest
import torch
from transformers.utils import logging

from quietstar.recipes.models import small_model
from quietstar.recipes.sft import SFTConfig, sft
from quietstar.tasks import Addition

logging.disable_progress_bar()


@pytest.fixture(scope="session")
def solver():
    """``(model, task)``: digit sums, about half of them right when sampled; copy the model before changing it."""
    task = Addition(1)
    model = small_model(task, width=64, heads=2, positions=128)
    rows = task.sample(600, "train", torch.Generator().manual_seed(0))
    examples = [(row.hinted_ids if i % 3 == 0 else row.prompt_ids, task.completion_ids(row)) for i, row in enumerate(rows)]
    sft(model, examples, 120, SFTConfig(learning_rate=3e-3, batch_tokens=600))
    return model.eval(), task
