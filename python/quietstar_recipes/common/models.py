"""The task and the model that a recipe starts with: from the hub, from a folder, or a small one from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from quietstar.checkpoints.pretrained import load_model, load_tokenizer
from quietstar.config import Dtype, option
from quietstar_kernels.checks import check, check_types
from quietstar_recipes import tasks
from quietstar_recipes.tasks import Task

GENERATED = ("multiplication", "addition", "scratchpad", "sums", "stories")


@dataclass
class TaskConfig:
    """Which problems to solve."""

    task: Literal["multiplication", "addition", "scratchpad", "sums", "stories", "gsm8k", "csqa"] = option(
        "multiplication", "which problems"
    )
    digits: int = option(
        2, "digits of each operand of a multiplication or an addition; most digits for scratchpad; digits of a sum, 2 or more"
    )
    other_digits: int | None = option(None, "digits of the second operand of a multiplication; default as many as the first")
    data: str = option("", "for gsm8k and csqa: a file of questions, or a folder with train.jsonl and test.jsonl")

    def __post_init__(self) -> None:
        check_types("TaskConfig", self)
        least = 2 if self.task == "sums" else 1
        check("TaskConfig", self, "digits", least <= self.digits <= 18, f"from {least} to 18")
        other = self.other_digits
        fits = other is None or (self.task == "multiplication" and 1 <= other <= 18)
        check("TaskConfig", self, "other_digits", fits, "None, or in a multiplication from 1 to 18")
        if bool(self.data) == (self.task in GENERATED):
            raise ValueError(f"TaskConfig: data must be {'empty' if self.data else 'a file'} where task is {self.task!r}")


def make_task(config: TaskConfig, tokenizer: Any = None) -> Task:
    """The task in the tokens of ``tokenizer``; default a small tokenizer, which only generated problems have.

    Raises:
        ValueError: a task that reads a file without a tokenizer, or a file that can't be used.
    """
    if config.task == "multiplication":
        return tasks.Multiplication(config.digits, config.other_digits, tokenizer)
    if config.task == "stories":
        return tasks.WordProblems(tokenizer)
    if config.task in GENERATED:
        kinds = {"addition": tasks.Addition, "scratchpad": tasks.Scratchpad, "sums": tasks.DigitSums}
        return kinds[config.task](config.digits, tokenizer)
    if tokenizer is None:
        raise ValueError(f"the task {config.task} needs a model with a tokenizer, not a small one from scratch")
    return (tasks.GSM8K if config.task == "gsm8k" else tasks.CommonsenseQA)(config.data, tokenizer)


def small_model(
    task: Task, layers: int = 2, width: int = 128, heads: int = 4, positions: int = 512, seed: int = 0
) -> GPT2LMHeadModel:
    """A GPT-2 from scratch for the task's tokens; 0.4 million weights with the default sizes."""
    config = GPT2Config(
        vocab_size=len(task.tokenizer),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's activation, in one operation instead of eight
        initializer_range=(3 * width) ** -0.5,  # as in PyTorch's layers; with 0.02, or twice this, it learns much later
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=task.end_id,
        eos_token_id=task.end_id,
        # No pad_token_id: GPT-2 would warn of a missing mask in ``generate``, which leaves out one of ones.
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def load(name: str, config: TaskConfig, dtype: Dtype = "float32", allow_bin: bool = False) -> tuple[PreTrainedModel, Task]:
    """Model and task; an empty name is a small model from scratch. See ``read`` for the arguments.

    Raises:
        ValueError: the model, its tokenizer or the task can't be loaded; one sentence.
    """
    if not name:
        task = make_task(config)
        return small_model(task).to(getattr(torch, dtype)), task
    model, tokenizer = read(name, dtype, allow_bin)
    return model, make_task(config, tokenizer)


def read(name: str, dtype: Dtype = "float32", allow_bin: bool = False) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer; on the GPU if there is one.

    Args:
        dtype: of the weights, whatever they were saved in. In half precision, small updates of all weights are rounded away.
        allow_bin: also take weights from pickle files; no code in them is run.

    Raises:
        ValueError: there is no such model.
    """
    tokenizer = load_tokenizer(name)
    model = load_model(name, allow_bin, dtype=dtype)
    return (cast(Any, model).to("cuda") if torch.cuda.is_available() else model), tokenizer
