"""The model card of a checkpoint."""

from __future__ import annotations

from quietstar.checkpoints.contents import Contents
from quietstar.hf.modules import unwrapped

CARD = "README.md"


def card(contents: Contents, tensors: str, settings: str) -> str:
    """The text of README.md; ``tensors`` and ``settings`` are names of the files beside it."""
    config = contents.config
    name = type(unwrapped(contents.model)).__name__
    if contents.base is None:
        what = "`AutoModelForCausalLM.from_pretrained` loads the language model alone"
    else:
        base = contents.model.name_or_path or name
        what = f"These are adapters of peft, without the model that they belong to, {base}"
    return f"""---
library_name: transformers
tags: [quiet-star]
---

# {name} that thinks before every token

A {name} trained with Quiet-STaR (arXiv 2403.09629) by quietstar-kernels: {config.thoughts} thoughts of
{config.thought_tokens} tokens at every position, {config.lookahead} tokens predicted after each, preset `{config.preset}`.

{what}; `quietstar.QuietStar.from_pretrained` loads all of it, with the
mixing head and thought embeddings (`{tensors}`, `{settings}`).

## Limits

A thought need not be the reason for an answer: it was rewarded for making the next tokens likelier, nothing else. Nothing
guards against harmful thoughts, and they are not meant to be shown as explanations.
"""
