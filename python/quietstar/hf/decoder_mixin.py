"""What others do with a transformers model and the wrapper hands on: gradient checkpointing, compilation, TRL's settings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quietstar.hf.modules import backbone

# What TRL's trainers read of a model, before they give it a loss of their own.
OF_TRL = ("generation_config", "add_model_tags")


class DecoderMixin(nn.Module):
    """For a module whose ``model`` is the language model."""

    model: PreTrainedModel

    def __getattr__(self, name: str) -> Any:
        if name in OF_TRL:
            raise AttributeError(
                f"{type(self).__name__} has no {name}, which TRL's trainers need: use `class ThoughtSFTTrainer(ThoughtTrainer, "
                "SFTTrainer): pass` with ThoughtTrainer from quietstar.trainer"
            )
        return super().__getattr__(name)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options: Any) -> None:
        """Recompute the decoder's layers in backward instead of keeping their activations; arguments as in transformers."""
        # transformers renames the method: the new name where there is one, since the old one warns.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options: Any) -> None:
        """The newer name of ``gradient_checkpointing_enable``, which transformers' Trainer calls."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.model.gradient_checkpointing_disable()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` for the language model's decoder, in place; arguments as there.

        One graph serves all steps of a rollout. The code around the decoder reads values and is not compiled:
        ``torch.compile(qs)`` gives the same numbers, with graph breaks there.
        """
        # Text, first rows, other rows and both at once; in training, evaluation and generation; at one length and at any.
        # Older versions of torch have a single limit.
        limit = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
        backbone(self.model).compile(*args, **{**limit, **kwargs})
