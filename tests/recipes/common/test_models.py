"""What a recipe starts with: a model in the requested dtype, and a task."""

import pytest
import torch

from quietstar_recipes.common.models import TaskConfig, load, make_task

ADDITION = TaskConfig(task="addition", digits=1)


def test_weights_are_loaded_in_single_precision_unless_asked_otherwise(solver, tmp_path):
    _, task = solver
    halved, path = load("", ADDITION)[0].bfloat16(), tmp_path / "model"
    halved.save_pretrained(path)
    task.tokenizer.save_pretrained(path)
    assert load(str(path), ADDITION)[0].dtype == torch.float32
    assert load(str(path), ADDITION, "bfloat16")[0].dtype == load("", ADDITION, "bfloat16")[0].dtype == torch.bfloat16


def test_a_task_has_the_digits_that_were_asked_for():
    configs = {"digits": 3, "other_digits": 2}, {"digits": 4}, {"task": "sums", "digits": 4}, {"task": "addition", "digits": 3}
    names = ["3 x 2-digit multiplication", "4-digit multiplication", "sums of 4 digits", "3-digit addition"]
    assert [make_task(TaskConfig(**config)).name for config in configs] == names
    with pytest.raises(ValueError, match="TaskConfig: digits must be from 2 to 18, got 1"):
        TaskConfig(task="sums", digits=1)
