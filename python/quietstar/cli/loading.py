"""Models, tokenizers and checkpoints that the commands load; each failure is one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from quietstar.checkpoints import native, pretrained
from quietstar.checkpoints.contents import TrainedOn
from quietstar.config import ThoughtConfig
from quietstar.data.held_out import check_held_out
from quietstar.data.texts import Data, DataConfig
from quietstar.model import QuietStar
from quietstar.run.processes import process_state


def load_model(name: str, thoughts: ThoughtConfig, tokenizer: Any, dtype: str, allow_bin: bool = False) -> QuietStar:
    """Wrap a plain language model, or continue with ``thoughts`` from one that thinks already."""
    if not native.thinks(name):
        return QuietStar(pretrained.load_model(name, allow_bin, dtype=dtype), thoughts, tokenizer)
    qs = QuietStar.from_pretrained(name, dtype=dtype)
    scale = qs.thought_config.embedding_scale
    if scale != thoughts.embedding_scale:
        raise ValueError(f"{name}: it was made with embedding_scale={scale}, not {thoughts.embedding_scale}")
    qs.use_config(thoughts)
    return qs


def load_checkpoint(name: str) -> QuietStar:
    """A model that thinks, in evaluation mode, on the GPU if there is one."""
    qs = QuietStar.from_pretrained(name).eval()
    return qs.to("cuda") if torch.cuda.is_available() else qs


def check_unseen(model: str, trained_on: Sequence[TrainedOn], config: DataConfig, data: Data, remedy: str) -> None:
    """Refuse held-out texts that a model was trained on, of which it would tell nothing; print what can't be checked.

    Args:
        model: its name, for the error.
        remedy: what to do instead, for the error.
    """
    try:
        unknown = check_held_out(trained_on, config, data)
    except ValueError as error:
        raise ValueError(f"{model}: {error}: {remedy}") from error
    if process_state().is_main_process:
        for sentence in unknown:
            print(f"{model}: {sentence}", file=sys.stderr)


def text_tokenizer(qs: QuietStar) -> Any:
    if qs.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    return qs.tokenizer
