"""Tiny random models of every type in transformers' causal-LM mapping, and the tables of which can think.

python tests/quietstar/hf/all_architectures.py    # writes the tables into docs/integrating.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import quietstar
from quietstar.hf.architectures import REFUSED

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).parents[3] / "docs/integrating.md"

# Sizes by every name that configs have for them; each config takes the names it has.
_SIZES = {
    64: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim",
    96: "intermediate_size ffn_dim n_inner d_ff dff ffn_hidden_size mlp_hidden_size intermediate_size_mlp",
    61: "vocab_size vocab_size_per_layer_input",
    32: "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    128: "max_position_embeddings n_positions max_seq_len",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads "
    "num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num eos_token_id "
    "type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
    16: "head_dim global_head_dim q_lora_rank kv_lora_rank qk_nope_head_dim",
    24: "qk_head_dim",
    12: "v_head_dim",
    8: "qk_rope_head_dim hidden_size_per_layer_input",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    7: "sliding_window attention_window",  # crossed by the self-test, inside the text and inside thoughts
    0: "pad_token_id",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONSTRUCTOR_ARGUMENTS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3": {"vision_config": _VISION},
    "got_ocr2": {"vision_config": _VISION | {"output_channels": 16, "mlp_dim": 32}},
    "phi4_multimodal": {
        "vision_config": _VISION | {"crop_size": 28, "image_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "nemo_conv_channels": 32,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
}
# Three layers, two of which mix positions in a recurrence, with the options that change it.
_LAYERS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8}
_DELTA |= {**_LAYERS, "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32}
_KIMI = {"linear_num_heads": 4, "linear_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 4}
_KIMI |= {**_LAYERS, "mlp_layer_types": ["dense", "sparse", "dense"], "num_expert_group": 1, "qk_rope_head_dim": 8}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}
_MAMBA |= {"hidden_size": 64}  # of which the heads are a part
_CONV = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}
CONSTRUCTOR_ARGUMENTS |= {
    "qwen3_5": {"text_config": _DELTA},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe": {"text_config": _DELTA},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "olmo_hybrid": _DELTA | {"linear_num_key_heads": 4, "linear_allow_neg_eigval": True},
    "kimi_linear": _KIMI,
    "bailing_hybrid": _KIMI,
    "lfm2": _CONV | {"conv_bias": True, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": _CONV | {"num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "lfm3": _CONV | {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "granitemoehybrid": _LAYERS | _MAMBA | {"position_embedding_type": "rope", "residual_multiplier": 0.5},
    "bamba": _MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1], "time_step_limit": (0.3, 1.5)},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], "key_multiplier": 0.5},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "adapter_rank": 8,
    },
    "mamba2": {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 2, "chunk_size": 16},
}
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # MLA: head_dim is the rotary part, and keys have all heads
SET_AFTERWARDS: dict[str, dict[str, Any]] = {
    name: _LATENT for name in ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"]
} | {"dots1": {"n_shared_experts": 1}}


def tiny_config(model_type: str) -> PretrainedConfig:
    """The type's default config with small sizes."""
    special = CONSTRUCTOR_ARGUMENTS.get(model_type, {})
    config = AutoConfig.for_model(model_type, **special)
    text = config.get_text_config()
    small = {name: size for name, size in SIZES.items() if name in text.to_dict() or name in text.attribute_map}
    if text is config:
        config = text = AutoConfig.for_model(model_type, **(small | special))
    chosen = special.get("text_config", special)
    for name, value in ({} if text is config and not special else small).items():
        setattr(text, name, chosen.get(name, value))
    for name, value in SET_AFTERWARDS.get(model_type, {}).items():
        setattr(text, name, value)
    if model_type == "dbrx":
        config.attn_config.rope_theta = 10000.0
    return config


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model with large random weights, so that a wrong mask or position shows; ``changes`` of its config."""
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert weights < 1_000_000, f"{model_type} is not tiny: {weights} weights"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # a state of a recurrence fades in one step, or in hundreds
                parameter.uniform_(-5, 1)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 0.5 if "conv" in name and parameter.shape[1] == 1 else 0.15)
    return model


def can_think(model_type: str) -> bool:
    """Try whether packed and stepwise thoughts equal ordinary forwards. Raises ValueError if a part differs."""
    report = quietstar.verify(tiny_model(model_type))
    if not report.ok:
        raise ValueError(f"{model_type}: {report}")
    return True


def tables() -> dict[str, str]:
    """What goes between the marks in docs/integrating.md: the types that work, and the refused ones by reason."""
    works = [f"`{name}`" for name in TYPES if name not in REFUSED]
    by_reason: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        by_reason.setdefault(reason, []).append(f"`{name}`")
    rows = [f"| {reason} | {', '.join(names)} |" for reason, names in by_reason.items()]
    return {"works": ", ".join(works), "refused": "\n".join(["| why | model types |", "|---|---|", *rows])}


def write() -> None:
    page = PAGE.read_text()
    for mark, text in tables().items():
        page = re.sub(rf"(?<=<!-- {mark}: begin -->\n).*?(?=\n<!-- {mark}: end -->)", text, page, flags=re.DOTALL)
    PAGE.write_text(page)


if __name__ == "__main__":
    write()
