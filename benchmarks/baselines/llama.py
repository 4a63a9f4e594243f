"""A Llama with random weights, for benchmarks of whole models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(case: Any, seed: int, **more: Any) -> LlamaForCausalLM:
    """With V, D, I, layers, H, G, dtype and device of the case; ``more`` goes to the config."""
    config = LlamaConfig(
        vocab_size=case.V,
        hidden_size=case.D,
        intermediate_size=case.I,
        num_hidden_layers=case.layers,
        num_attention_heads=case.H,
        num_key_value_heads=case.G,
        initializer_range=case.D**-0.5,
        tie_word_embeddings=False,
        dtype=case.dtype,
        **more,
    )
    torch.manual_seed(seed)
    with torch.device(case.device):
        return LlamaForCausalLM(config).to(case.dtype)
