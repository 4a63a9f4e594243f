"""The attention function for transformers; only the kernels hub's copy of this package has this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layout import ThoughtLayout
from .thought_attention import thought_attention

WITHOUT_EFFECT = ("position_ids", "position_embeddings", "cache_position")  # tensors that some models pass along
supports_flash_attn = True  # with this and the function's name, transformers takes the function as it is


def flash_attn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    thought_layout: ThoughtLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of packed text and branch rows, as transformers calls it: query [B,H,M,K] to [B,M,H,E].

    With ``attn_implementation="<user>/quietstar-kernels"`` a model takes packed ids [B,M],
    ``position_ids=layout.position_ids()``, ``thought_layout=layout`` and ``use_cache=False``. The layout alone says which row
    sees which: padding belongs into it, and not into ``attention_mask``, which is ignored, also where a model means chunks or a
    prefix by it.

    Raises:
        ValueError: without a layout, with dropout, or if a model passes other tensors, such as biases of positions.
    """
    if not isinstance(thought_layout, ThoughtLayout):
        raise ValueError(f"{type(module).__name__}: pass thought_layout=, a ThoughtLayout of this kernel, to the model")
    if unknown := [name for name, x in options.items() if isinstance(x, Tensor) and name not in WITHOUT_EFFECT]:
        raise ValueError(f"{type(module).__name__} passes {', '.join(unknown)} to attention, which has no use for it here")
    if dropout:
        raise ValueError("attention has no dropout here")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = thought_attention(query, key, value, thought_layout, scaling, sliding_window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None
