"""Models, tokenizers and checkpoints that the commands load; each failure is one line."""

from __future__ import annotations

from typing import Any

import torch

from quietstar.checkpoints import native, pretrained
from quietstar.config import ThoughtConfig
from quietstar.model import QuietStar


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


def text_tokenizer(qs: QuietStar) -> Any:
    if qs.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    return qs.tokenizer
