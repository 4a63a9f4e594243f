"""The modules of a Hugging Face causal language model that the wrapper calls or changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn
from transformers import PreTrainedModel


def embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The token embeddings. A call applies the model's scaling and adapters; ``weight`` has neither."""
    return cast(nn.Embedding, model.get_input_embeddings())


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's, with the adapters in its layers; a model without adapters is returned as it is."""
    inner = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if inner is None else inner())


def backbone(model: nn.Module) -> nn.Module:
    """The decoder, whose ``last_hidden_state`` is the input of the output head."""
    model = unwrapped(model)
    return model.base_model if model.base_model is not model else model.model


@contextmanager
def layer_checkpoints_off(model: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing of single layers off inside the context, for code that is recomputed as a whole."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; afterwards every submodule is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
