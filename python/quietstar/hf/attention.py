"""The attention function that transformers calls: thought attention with a layout, ordinary attention without one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from quietstar.hf.architectures import DROP_LAYOUT, WITHOUT_EFFECT, check_row_count, chunk_limit, wrong_with_layout
from quietstar.hf.decoder import PackedPass, ThoughtPass
from quietstar.hf.positions import check_layout, rotary_limits
from quietstar.hf.recurrent import FILES, given_layout
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import refusal

NAME = "quietstar"
# Used by the wrapper: calls without a layout run ordinary attention.
WRAPPED_NAME = "quietstar_wrapped"


class MaskArguments:
    """The arguments that a layer's mask would be built from, in place of the mask: a layer's window without a dense tensor."""

    ndim = 4

    def __init__(self, **arguments: Any):
        # With a static cache, ``generate`` builds the masks and the model passes them here again as a finished mask.
        finished = arguments["attention_mask"]
        self.arguments: dict[str, Any] = finished.arguments if isinstance(finished, MaskArguments) else arguments
        self._dense: Tensor | None = None
        self.layout: ThoughtLayout | ThoughtPass | None = None  # set by hand_on_layout's hook
        if (error := wrong_with_layout(arguments["config"])) and given_layout():  # perhaps no layer has attention
            raise error

    def window(self, positions: int) -> int | None:
        """How many of the last positions a row sees, counting its own; None if it sees all of them.

        Args:
            positions: every row is at a smaller position. Inside one chunk, chunked attention equals full attention.
        """
        local_size = self.arguments.get("local_size")
        if local_size is not None and local_size == chunk_limit(self.arguments["config"]):
            if positions > local_size:
                raise ValueError(
                    f"text and thoughts may take {positions} positions and attention is cut into chunks of {local_size}: "
                    "use a shorter text or shorter thoughts"
                )
            return None
        return local_size

    def dense(self, make: Callable[..., Any]) -> Tensor | None:
        """The mask for ordinary attention, built once for all layers that share it."""
        if self._dense is None:
            self._dense = make(**self.arguments)
        return self._dense

    def contiguous(self) -> MaskArguments:
        return self


def thought_forward(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    thought_layout: ThoughtLayout | ThoughtPass,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in a forward with a layout: query [B,H,rows,K] to [B,rows,H,E]; key and value as ``ThoughtPass.attend``."""
    if isinstance(attention_mask, Tensor):
        raise ValueError("with a thought layout attention_mask must be None or [B,M], got a prepared mask tensor")
    unknown = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in WITHOUT_EFFECT]
    if unknown:
        raise ValueError(f"{type(module).__name__} passes {', '.join(unknown)} to attention, which thoughts do not support")
    if dropout:
        _warn_dropout()
    if isinstance(thought_layout, ThoughtLayout):
        here = any(x.__module__ in FILES for x in type(module).__mro__)  # FSDP makes classes of its own
        if error := wrong_with_layout(module.config, in_attention_only=not here):
            raise error
        check_layout(type(module).__name__, rotary_limits(cast(PretrainedConfig, module.config)), thought_layout)
    thought_pass = PackedPass(thought_layout) if isinstance(thought_layout, ThoughtLayout) else thought_layout
    if not isinstance(thought_pass, ThoughtPass):
        raise refusal("thought_layout", "a ThoughtLayout", thought_layout)
    check_row_count(module, max(query.shape[2], thought_pass.positions))
    window = sliding_window
    if isinstance(attention_mask, MaskArguments):
        window = attention_mask.window(thought_pass.positions)
    dtype = query.dtype if value is None else value.dtype  # that of cos and sin may be wider
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = query.to(dtype), *(None if x is None else x.to(dtype) for x in (key, value))
    out = thought_pass.attend(query, key, value, scale=scaling, window=window, softcap=softcap, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _plain_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention in a forward without a layout: sdpa, or the model's own eager code for features that sdpa lacks."""
    eager = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if isinstance(attention_mask, MaskArguments):
        attention_mask = attention_mask.dense(eager_mask if eager else sdpa_mask)
    if eager:
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _attention(without_layout: str) -> Callable[..., Any]:
    """The attention function to register; ``without_layout`` as in ``register_attention``."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layout = kwargs.pop("thought_layout", None)
        if layout is None and isinstance(attention_mask, MaskArguments):  # a tensor's ``layout`` is its memory format
            layout = attention_mask.layout
        if layout is not None:
            return thought_forward(module, query, key, value, attention_mask, thought_layout=layout, **kwargs)
        if given_layout() is not None:
            raise ValueError(
                f"{type(module).__name__}: thought_layout was passed to the model but did not arrive at attention; "
                "this architecture drops keyword arguments"
            )
        if without_layout == "raise":
            raise ValueError(
                f"{type(module).__name__}: attention 'quietstar' was called without a thought_layout; pass thought_layout= to "
                "the model, or call quietstar.register_attention(without_layout='sdpa') to run such calls as plain attention"
            )
        return _plain_forward(module, query, key, value, attention_mask, **kwargs)

    return forward


_HOOKED = "_quietstar_hooked"


def hand_on_layout(model: PreTrainedModel) -> None:
    """Let the layout reach attention in models whose decoder layers drop keyword arguments; other models are unchanged.

    A hook puts it on the mask, which is built for each forward. Gradient checkpointing runs a layer again without its hooks,
    possibly after other forwards, but with the same mask.
    """
    if model.config.model_type not in DROP_LAYOUT:
        return
    for layer in model.get_decoder().layers:
        if not hasattr(layer, _HOOKED):
            setattr(layer, _HOOKED, True)
            layer.register_forward_pre_hook(_put_layout_on_mask, with_kwargs=True)


def _put_layout_on_mask(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs.get("attention_mask"), MaskArguments):
        kwargs["attention_mask"].layout = kwargs.get("thought_layout")


@cache
def _warn_dropout() -> None:
    warnings.warn("attention dropout is ignored in forwards with thoughts", stacklevel=2)


def register_attention(without_layout: str = "raise") -> str:
    """Register ``attn_implementation="quietstar"`` with transformers.

    ``model(input_ids, position_ids=layout.position_ids(), thought_layout=layout)`` then runs packed text and thoughts.

    Args:
        without_layout: what a call without ``thought_layout`` does: "raise", or "sdpa" for ordinary attention. A layout that
            was passed to the model but did not arrive at attention raises in both cases.

    Returns:
        The registered name, "quietstar".

    Raises:
        ValueError: ``without_layout`` has another value.
    """
    if not isinstance(without_layout, str) or without_layout not in ("raise", "sdpa"):
        raise refusal("register_attention: without_layout", "'raise' or 'sdpa'", without_layout)
    _register(NAME, without_layout)
    return NAME


def _register(name: str, without_layout: str) -> None:
    AttentionInterface.register(name, _attention(without_layout))
    AttentionMaskInterface.register(name, MaskArguments)


_register(WRAPPED_NAME, "sdpa")
