"""What natural_text.py measures of a model: losses of held-out texts with its thoughts and control thoughts, and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from natural_text_settings import Experiment

from quietstar import QuietStar
from quietstar.checkpoints.pretrained import load_tokenizer
from quietstar.cli.common import load_checkpoint, load_model
from quietstar.evaluation.losses import (
    TokenLosses,
    token_losses,
    with_constant_thoughts,
    with_own_thoughts,
    with_random_thoughts,
    with_thoughts_of_another,
)
from quietstar.evaluation.questions.asking import Asking, ask
from quietstar.evaluation.questions.reading import Question
from quietstar.run.batches import Example

BASE = "base"  # the name of the model that all arms begin with


@lru_cache(maxsize=1)
def model(e: Experiment, name: str) -> QuietStar:
    """The model of the folder ``name``, fp32, to evaluate; kept until another is asked for, or ``model.cache_clear()``.

    In bf16, most of the small steps that it was trained with would be rounded away.
    """
    model.cache_clear()  # before, or two would be on the GPU at once
    if name != BASE:
        return load_checkpoint(str(e.folder / name))
    qs = load_model(e.model, e.thought_config("plain"), load_tokenizer(e.model), "float32").eval()
    return qs.to("cuda") if torch.cuda.is_available() else qs


def held_out_losses(qs: QuietStar, texts: Sequence[Example], thinks: bool, batch_size: int) -> dict[str, list[float]]:
    """The loss of each text, the mean over its tokens in nats, by the thoughts before them.

    Returns:
        base, without a thought; and for a model that ``thinks`` own, another, constant and random.
    """
    if not thinks:
        shortest = qs.with_config(replace(qs.thought_config, thought_tokens=1))  # its thoughts are made, and not used
        return {"base": of_each_text(losses := token_losses(shortest, texts, batch_size, controls=False), losses.base)}
    own = with_own_thoughts(qs, texts, batch_size)
    ways = {
        "own": own,
        "another": with_thoughts_of_another(own),
        "constant": with_constant_thoughts(own),
        "random": with_random_thoughts(own, qs.lm_head.linear.out_features),
    }
    found = {way: token_losses(qs, examples, batch_size, controls=False) for way, examples in ways.items()}
    without = {"base": of_each_text(found["own"], found["own"].base)}
    return without | {way: of_each_text(losses, losses.mixed) for way, losses in found.items()}


def of_each_text(losses: TokenLosses, values: Any) -> list[float]:
    return (losses.text.bincount(values) / losses.text.bincount()).tolist()


def answers(
    qs: QuietStar, questions: Sequence[Question], thinks: bool, new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    """Each question with its answers: under base without thoughts, under thinking with them."""
    asking = Asking("always" if thinks else "never", max_new_tokens=new_tokens, batch_size=batch_size)
    found: list[dict[str, Any]] = ask(qs, questions, asking).to_dict()["questions"]
    return found
