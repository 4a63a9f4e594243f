"""Layouts for a while: forwards with them on a model that its owner runs without.

Attention "sdpa" is replaced only inside ``with layouts_on(model)``, and the model is as before afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from quietstar.hf.architectures import DROP_LAYOUT, most_rows
from quietstar.hf.attention import WRAPPED_NAME
from quietstar.hf.linear import FastLinear
from quietstar.hf.lm_head import LMHead
from quietstar.hf.modules import unwrapped
from quietstar.hf.positions import rotary_limits
from quietstar.hf.verify import checked_head

_heads: WeakKeyDictionary[PreTrainedModel, LMHead | None] = WeakKeyDictionary()
_PASSING = (OSError, ImportError, torch.OutOfMemoryError)  # they say nothing about the model, so the next call tries again


def layout_head(model: PreTrainedModel) -> LMHead | None:
    """The output head of a model that runs with a layout as without one, in fp32 up to rounding; None for other models.

    The first call for a model compares the two on a few tokens. None too for attention other than "sdpa", weights that are not
    fp32, autocast, a forward that something else has replaced or hooked, and what a layout changes in training: dropout, and
    checkpoints, whose layers run again after the forward.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or not _is_plain(inner) or _draws_or_runs_again(model):
        return None
    if inner not in _heads:
        # Layers that drop layouts need hooks that stay; chunks and some rotary embeddings limit a forward.
        limited = inner.config.model_type in DROP_LAYOUT or most_rows(inner) < sys.maxsize or rotary_limits(inner.config)
        try:
            _heads[inner] = None if limited else checked_head(model)
        except _PASSING:
            return None
        except Exception:  # an ordinary forward serves where anything is unusual
            _heads[inner] = None
    head, linear = _heads[inner], inner.get_output_embeddings()
    # Adapters, which may have come since, put a layer of another class there.
    return replace(head, linear=linear) if head is not None and type(linear) in (nn.Linear, FastLinear) else None


def _is_plain(model: PreTrainedModel) -> bool:
    return (
        model.config._attn_implementation == "sdpa"
        and model.dtype == torch.float32
        and not torch.is_autocast_enabled(model.device.type)
        and "forward" not in vars(model)
        and not (model._forward_hooks or model._forward_pre_hooks)
    )


def _draws_or_runs_again(model: nn.Module) -> bool:
    """Whether a module in training mode has dropout or is checkpointed."""
    return any(
        module.training
        and (
            getattr(module, "gradient_checkpointing", False)
            or (isinstance(module, nn.Dropout) and module.p > 0)
            or bool(getattr(module, "attention_dropout", 0))
        )
        for module in model.modules()
    )


@contextmanager
def layouts_on(model: PreTrainedModel) -> Iterator[None]:
    """In this context the model's attention takes layouts; calls without one run sdpa."""
    inner = unwrapped(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(WRAPPED_NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
