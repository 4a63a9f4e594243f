"""Log-probabilities of token sequences that begin alike, each shared token computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.group_rl.completions import answering, end_logprobs
from quietstar.hf.architectures import check_model, no_model
from quietstar.hf.attention import NAME, WRAPPED_NAME, hand_on_layout
from quietstar.hf.lm_head import LMHead, find_lm_head
from quietstar.hf.modules import unwrapped
from quietstar.hf.verify import verify_once
from quietstar_kernels.checks import Checker

_heads: WeakKeyDictionary[PreTrainedModel, LMHead] = WeakKeyDictionary()


def shared_logprobs(model: nn.Module, sequences: Sequence[Sequence[int] | Tensor], temperature: float = 1.0) -> list[Tensor]:
    """Log-probabilities of every token of every sequence but the first, given those before it, in nats. Differentiable.

    A prompt, a turn or an attempt that several sequences begin with is computed once, forward and backward. The results are
    those of a forward for each sequence, up to rounding.

    Args:
        model: a decoder with ``attn_implementation="quietstar"``; call ``quietstar.register_attention("sdpa")`` before it is
            loaded. It may be wrapped, by PEFT or DistributedDataParallel for example. The first call checks the model: make one
            before its weights are sharded.
        sequences: token ids of each, as lists or integer tensors [T].
        temperature: divides the logits.

    Returns:
        For each sequence, fp32 [T-1] (fp64 for fp64 models), on the model's device.

    Raises:
        ValueError: another attention, a model that can't think, a sequence that isn't integers [T], or another temperature.
    """
    whole: Any = model
    while isinstance(getattr(whole, "module", None), nn.Module):  # DistributedDataParallel's, for example
        whole = whole.module
    inner = unwrapped(whole)
    if not isinstance(inner, PreTrainedModel) or inner.config._attn_implementation not in (NAME, WRAPPED_NAME):
        raise no_model("shared_logprobs: model", "a transformers model with attn_implementation='quietstar'", whole)
    check = Checker("shared_logprobs")
    given, temperature = check.sequences(sequences), check.temperature(temperature)
    if inner not in _heads:
        check_model(whole)
        hand_on_layout(inner)
        verify_once(inner)
        _heads[inner] = find_lm_head(inner)
    if not any(map(len, given)):
        return [torch.zeros(0, device=inner.device) for _ in given]
    counts = torch.tensor([len(ids) - 1 for ids in given], device="cpu").clamp(min=0)
    live = torch.arange(int(counts.max()), device="cpu") < counts[:, None]
    with answering(inner, partial(end_logprobs, inner, _heads[inner], given, live, temperature)):
        logprobs, _ = model()
    return [row[:count] for row, count in zip(logprobs, counts.tolist(), strict=True)]
