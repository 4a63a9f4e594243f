"""Which architectures can think: those that are refused and why, and what some of the others need.

To support another one, remove it from the reasons below and add what it needs here, or in ``lm_head.py`` for a new kind of
output head. Then run tests/quietstar/hf/test_all_architectures.py, which tries every model type, and all_architectures.py in
the same folder, which writes the tables in docs/integrating.md.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PretrainedConfig, PreTrainedModel

from quietstar.hf.modules import unwrapped
from quietstar_kernels.checks import refusal

_MIXES = "it mixes positions outside attention, in recurrent, convolutional or linear layers, where no mask reaches"
_NO_POSITIONS = "it takes no position_ids, so thought rows would get wrong positions"
_BLOCKS = "it selects blocks of keys by row index"
_REASONS = {
    _MIXES: ("jamba qwen4_exp qwen4_exp_text recurrent_gemma zamba minimax zaya inkling_text mamba falcon_mamba rwkv xlstm"),
    "its attention does not go through transformers' AttentionInterface": (
        "falcon bloom mpt gpt_neo gptj codegen gpt_neox_japanese xglm openai-gpt rembert megatron-bert big_bird mvp trocr git "
        "cpmant roformer reformer prophetnet xlm xlnet"
    ),
    _NO_POSITIONS: (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart pegasus plbart whisper moss_transcribe_diarize"
    ),
    "its attention needs a dense mask tensor": (
        "doge deepseek_v32 glm_moe_dsa axk2 hy_v4 dots3_note dots3_note_text deepseek_v4 inkling2_text"
    ),
    "it looks up embeddings by token id inside its layers, so learned start and end vectors would be wrong": (
        "gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text gemma4_assistant gemma4_unified_assistant"
    ),
    "it reads bytes in patches or audio in several codes, not one row of tokens": "blt musicgen musicgen_melody",
    _BLOCKS: "minimax_m3_vl_text",
    "its output head is more than one linear layer": (
        "bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm roc_bert xlm-roberta "
        "xlm-roberta-xl xmod modernbert-decoder"
    ),
}
# The reason by model type.
REFUSED = {model_type: reason for reason, types in _REASONS.items() for model_type in types.split()}

# What configs call layers that mix positions outside attention.
_MIXING_LAYERS = frozenset(("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"))

# Files of transformers whose recurrent layers take a layout, by recurrent.py, and the model types in them.
RECURRENT_FILES = [
    "qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2", "lfm2_moe", "lfm3",
    "granitemoehybrid", "nemotron_h", "bamba", "falcon_h1", "zamba2", "mamba2",
]  # fmt: skip
RECURRENT = frozenset(RECURRENT_FILES + ["qwen3_5_text", "qwen3_5_moe_text"])
# Files of refused ones that nothing but recurrent layers mixes positions in.
WITHOUT_ATTENTION = ["mamba", "falcon_mamba", "rwkv", "xlstm"]

# Model types whose decoder layers are given the layout but don't pass it on to attention.
DROP_LAYOUT = ("nemotron", "stablelm")

# Tensors that models pass to attention and that don't change its result.
WITHOUT_EFFECT = ("position_ids", "position_embeddings", "cache_position")


def check_architecture(config: PretrainedConfig) -> None:
    """Raises ValueError, with the reason, for a model type that can't think."""
    reason = _reason(config)
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, not a causal language model"
    if reason is not None:
        raise ValueError(f"model type {config.model_type!r} cannot think: {reason}")


def wrong_with_layout(config: Any, in_attention_only: bool = False) -> ValueError | None:
    """The error for a model whose numbers would be wrong with a layout; the wrapper refuses more model types.

    ``in_attention_only``: the layout doesn't reach recurrent layers.
    """
    reason = _MIXES if in_attention_only and config.model_type in RECURRENT else _reason(config)
    if reason not in (_MIXES, _NO_POSITIONS, _BLOCKS):
        return None
    return ValueError(f"model type {config.model_type!r} cannot think: {reason}")


def _reason(config: Any) -> str | None:
    if config.model_type in REFUSED or config.model_type in RECURRENT:
        return REFUSED.get(config.model_type)
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    return None if _MIXING_LAYERS.isdisjoint(layers) else _MIXES


_convolutions: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def convolutions(model: nn.Module) -> int:
    """How many convolutions over rows a forward has, one in each recurrent layer."""
    inner = unwrapped(model)
    if inner.config.model_type not in RECURRENT:
        return 0
    if inner not in _convolutions:
        layers = getattr(inner.config.get_text_config(), "layer_types", None) or ()
        found = (name for name, module in inner.named_modules() if isinstance(module, nn.Conv1d))
        there = sum(".modules_to_save." not in name for name in found)  # peft's copies
        _convolutions[inner] = max(there, sum(kind in _MIXING_LAYERS for kind in layers))  # kernels may replace modules
    return _convolutions[inner]


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError for anything but a transformers model, perhaps with adapters, of a type that can think."""
    if not isinstance(model, nn.Module) or not isinstance(unwrapped(model), PreTrainedModel):
        raise no_model("model", "a model of transformers", model)
    check_architecture(model.config)


def no_model(name: str, wanted: str, model: Any) -> ValueError:
    """The error for something else, or for a model inside a wrapper."""
    error = refusal(name, wanted, model)
    if isinstance(model, OptimizedModule):
        return ValueError(f"{error}: call model.compile() in place of torch.compile(model)")
    if isinstance(getattr(model, "module", None), nn.Module):
        return ValueError(f"{error}: pass the model in it, and wrap the result")
    return error


def chunk_limit(config: PretrainedConfig) -> int | None:
    """Positions in a chunk, for a model whose layers cut attention into chunks; None for others."""
    return getattr(config, "attention_chunk_size", None)


def check_row_count(layer: nn.Module, rows: int) -> None:
    """Raises ValueError for more rows than a layer can take that scales its attention by row index.

    Llama 4 scales attention in steps of ``floor_scale`` positions, but counts rows where it means positions.
    """
    first = _first_scaled_row(layer)
    if first is not None and rows >= first:
        raise ValueError(
            f"{type(layer).__name__} scales attention by row index from row {first - 1:.0f} on, got {rows} rows: "
            "use fewer anchors or thoughts, or set attn_temperature_tuning to False"
        )


def most_rows(model: PreTrainedModel) -> int:
    """The largest number of text and thought rows that a model can take at once."""
    limits = [chunk_limit(model.config.get_text_config())]
    for module in model.modules():
        first = _first_scaled_row(module)
        limits.append(None if first is None else int(first) - 1)
    return min((limit for limit in limits if limit), default=sys.maxsize)


def _first_scaled_row(layer: nn.Module) -> float | None:
    """The number of rows from which a layer scales its attention by row index; None where it never does."""
    return getattr(layer, "floor_scale", None) if getattr(layer, "attn_temperature_tuning", False) else None
