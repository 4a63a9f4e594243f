"""A small model that solves only some problems, trained once; and a signal in the middle of a run."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch
from transformers.utils import logging

from quietstar.recipes.common.models import small_model
from quietstar.recipes.common.sft import SFTConfig, sft
from quietstar.recipes.tasks import Addition
from quietstar.run.signals import Interrupted

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


@pytest.fixture
def stopped(monkeypatch):
    """``with stopped(owner, name, n):`` a run that SIGTERM ends during a call of ``owner.name``, after ``n`` others."""

    @contextmanager
    def context(owner, name, n):
        original, calls = getattr(owner, name), []

        def terminated(*arguments, **options):
            calls.append(name)
            if len(calls) == n + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(owner, name, terminated)
            yield

    return context
