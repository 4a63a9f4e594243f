"""Plugs thought_attention into transformers' AttentionInterface, and says which architectures can't use it and why."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from quietstar.hf.cache import PackedPass, ThoughtPass
from quietstar_kernels import ThoughtLayout

NAME = "quietstar"
# The wrapper's own registration, whose calls without a layout are the plain model's.
WRAPPED_NAME = "quietstar_wrapped"

_REASONS = {
    "it mixes positions outside attention, in recurrent, convolutional or linear layers, where no mask reaches": (
        "jamba nemotron_h qwen3_next qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text "
        "olmo_hybrid recurrent_gemma zamba zamba2 minimax falcon_h1 lfm2 lfm2_moe lfm3 kimi_linear bailing_hybrid zaya "
        "inkling_text mamba mamba2 falcon_mamba rwkv xlstm bamba granitemoehybrid"
    ),
    "its attention does not go through transformers' AttentionInterface": (
        "falcon bloom mpt gpt_neo gptj codegen gpt_neox_japanese xglm openai-gpt rembert megatron-bert big_bird mvp trocr git "
        "cpmant roformer reformer prophetnet xlm xlnet"
    ),
    "it takes no position_ids, so thought rows would get wrong positions": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart pegasus plbart whisper moss_transcribe_diarize"
    ),
    "its attention needs a dense mask tensor": (
        "doge deepseek_v32 glm_moe_dsa axk2 hy_v4 dots3_note dots3_note_text deepseek_v4 inkling2_text"
    ),
    "it looks up embeddings by token id inside its layers, so learned start and end vectors would be wrong": (
        "gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text gemma4_assistant gemma4_unified_assistant"
    ),
    "it reads bytes in patches or audio in several codes, not one row of tokens": "blt musicgen musicgen_melody",
    "it selects blocks of keys by row index": "minimax_m3_vl_text",
    "its output head is more than one linear layer": (
        "bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm roc_bert xlm-roberta "
        "xlm-roberta-xl xmod modernbert-decoder"
    ),
}
REFUSED = {model_type: reason for reason, types in _REASONS.items() for model_type in types.split()}

# Tensors that models hand to attention without any effect on its result.
_HARMLESS = {"position_ids", "position_embeddings", "cache_position"}


def check_architecture(config: PretrainedConfig) -> None:
    """Raises ValueError, with the reason, for a model type that can't think."""
    reason = REFUSED.get(config.model_type)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, not a causal language model"
    if reason is not None:
        raise ValueError(f"model type {config.model_type!r} cannot think: {reason}")


class MaskArguments:
    """What a layer's mask is made of. Stands in for the mask, so that a layer knows its window without a dense tensor."""

    ndim = 4

    def __init__(self, **arguments: Any):
        # For a static cache ``generate`` makes the masks, and the model hands them in once more as a finished mask.
        finished = arguments["attention_mask"]
        self.arguments: dict[str, Any] = finished.arguments if isinstance(finished, MaskArguments) else arguments
        self._dense: Tensor | None = None
        self.layout: ThoughtLayout | ThoughtPass | None = None  # where layers hand on the mask alone

    def window(self, positions: int) -> int | None:
        """Of how many positions a row sees the last, itself included; None where it sees all of them.

        Args:
            positions: no row stands at this position or later. Within one chunk, attention in chunks is whole attention.

        Raises:
            ValueError: a layer that cuts attention into chunks, and positions that may lie in two.
        """
        local_size = self.arguments.get("local_size")
        if local_size is not None and local_size == getattr(self.arguments["config"], "attention_chunk_size", None):
            if positions > local_size:
                raise ValueError(
                    f"text and thoughts may take {positions} positions and attention is cut into chunks of {local_size}: "
                    "use a shorter text or shorter thoughts"
                )
            return None
        return local_size

    def dense(self, make: Callable[..., Any]) -> Tensor | None:
        """The mask a plain call wants, made once for all layers that share it."""
        if self._dense is None:
            self._dense = make(**self.arguments)
        return self._dense

    def contiguous(self) -> MaskArguments:
        return self


def _thought_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    """Attention of a forward that carries a layout: query [B,H,rows,K] to [B,rows,H,E]."""
    if isinstance(attention_mask, Tensor):
        raise ValueError("with a thought layout attention_mask must be None or [B,M], got a prepared mask tensor")
    unknown = [name for name, x in kwargs.items() if isinstance(x, Tensor) and name not in _HARMLESS]
    if unknown:
        raise ValueError(f"{type(module).__name__} passes {', '.join(unknown)} to attention, which thoughts do not support")
    if dropout:
        _warn_dropout()
    serve = PackedPass(thought_layout) if isinstance(thought_layout, ThoughtLayout) else thought_layout
    _check_row_count(module, max(query.shape[2], serve.positions))
    window = sliding_window
    if isinstance(attention_mask, MaskArguments):
        window = attention_mask.window(serve.positions)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = serve.attend(query, key, value, scale=scaling, window=window, softcap=softcap, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _plain_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a forward without a layout: sdpa, or the model's own eager code where sdpa lacks a feature."""
    eager = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if isinstance(attention_mask, MaskArguments):
        attention_mask = attention_mask.dense(eager_mask if eager else sdpa_mask)
    if eager:
        return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _attention(without_layout: str) -> Callable[..., Any]:
    """The attention function to register, ``without_layout`` "raise" or "sdpa"."""

    def forward(module, query, key, value, attention_mask, **kwargs):
        layout = kwargs.pop("thought_layout", None)
        if layout is None and isinstance(attention_mask, MaskArguments):  # a tensor has a layout of another kind
            layout = attention_mask.layout
        if layout is not None:
            return _thought_forward(module, query, key, value, attention_mask, thought_layout=layout, **kwargs)
        if _was_passed():
            raise ValueError(
                f"{type(module).__name__}: thought_layout was passed to the model but did not arrive at attention; "
                "this architecture drops keyword arguments on the way"
            )
        if without_layout == "raise":
            raise ValueError(
                f"{type(module).__name__}: attention 'quietstar' was called without a thought_layout; pass thought_layout= to "
                "the model, or call quietstar.register_attention(without_layout='sdpa') to let such calls be plain attention"
            )
        return _plain_forward(module, query, key, value, attention_mask, **kwargs)

    return forward


def _was_passed() -> bool:
    """True where a call of a model up the stack was given a ``thought_layout``: then a plain call is a layout lost on the way.

    Every torch module call holds the module in a local named ``self`` and its keywords in one named ``kwargs``. A caller's own
    functions and modules may hold a layout for another call, so only transformers' models count.
    """
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2).f_back
    while frame is not None:
        module, keywords = frame.f_locals.get("self"), frame.f_locals.get("kwargs")
        if isinstance(module, PreTrainedModel) and isinstance(keywords, dict) and keywords.get("thought_layout") is not None:
            return True
        frame = frame.f_back
    return False


def _check_row_count(module: nn.Module, rows: int) -> None:
    """Llama 4 warms its attention by the index of a row, in steps of ``floor_scale``, where it means the position."""
    scale = _row_scale(module)
    if scale is not None and rows >= scale:
        raise ValueError(
            f"{type(module).__name__} scales attention by row index from row {scale - 1:.0f} on, got {rows} rows: "
            "use fewer anchors or thoughts, or set attn_temperature_tuning to False"
        )


def most_rows(model: PreTrainedModel) -> int:
    """How many rows text and thoughts may have where layers cut attention into chunks or scale it by a row's index."""
    scales = [_row_scale(module) for module in model.modules()]
    limits = [getattr(model.config.get_text_config(), "attention_chunk_size", None), *(scale and scale - 1 for scale in scales)]
    return int(min((limit for limit in limits if limit), default=sys.maxsize))


def _row_scale(module: nn.Module) -> float | None:
    """The row from which on a layer scales its attention, None where it does not."""
    return getattr(module, "floor_scale", None) if getattr(module, "attn_temperature_tuning", False) else None


# Model types whose decoder layers get the layout and do not hand it to attention.
_KEEP_KEYWORDS = ("nemotron", "stablelm")
_HOOKED = "_quietstar_hooked"


def hand_on_layout(model: PreTrainedModel) -> None:
    """Lets attention find the layout in models whose decoder layers drop keyword arguments; others stay as they are.

    It goes with the mask, which is made anew for each forward: gradient checkpointing runs a layer again without its hooks, and
    perhaps after other forwards, but with its mask.
    """
    if model.config.model_type not in _KEEP_KEYWORDS:
        return
    for layer in model.get_decoder().layers:
        if not hasattr(layer, _HOOKED):
            setattr(layer, _HOOKED, True)
            layer.register_forward_pre_hook(_put_layout_on_mask, with_kwargs=True)


def _put_layout_on_mask(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if isinstance(kwargs.get("attention_mask"), MaskArguments):
        kwargs["attention_mask"].layout = kwargs.get("thought_layout")


_dropout_warned = False


def _warn_dropout() -> None:
    global _dropout_warned
    if not _dropout_warned:
        _dropout_warned = True
        warnings.warn("attention dropout is not used in forwards with thoughts; it is taken as 0", stacklevel=2)


def register_attention(without_layout: str = "raise") -> str:
    """Make ``attn_implementation="quietstar"`` known to transformers.

    Then ``model(input_ids, position_ids=layout.position_ids(), thought_layout=layout)`` runs packed text and thoughts.

    Args:
        without_layout: what a call without ``thought_layout`` does: "raise", or "sdpa" for plain attention. A layout that
            was passed to the model and did not arrive at attention raises in both cases.

    Returns:
        The name to use, "quietstar".

    Raises:
        ValueError: another value of ``without_layout``.
    """
    if without_layout not in ("raise", "sdpa"):
        raise ValueError(f"register_attention: without_layout must be 'raise' or 'sdpa', got {without_layout!r}")
    _register(NAME, without_layout)
    return NAME


def _register(name: str, without_layout: str) -> None:
    AttentionInterface.register(name, _attention(without_layout))
    AttentionMaskInterface.register(name, MaskArguments)


_register(WRAPPED_NAME, "sdpa")
