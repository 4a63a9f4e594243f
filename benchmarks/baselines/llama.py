"""A Llama with random weights, for benchmarks of whole models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Shapes of models that people train; Llamas all the same.
SMOLLM2_135M = {"layers": 30, "D": 576, "I": 1536, "H": 9, "G": 3, "V": 49152}
QWEN3_600M = {"layers": 28, "D": 1024, "I": 3072, "H": 16, "G": 8, "width": 128, "V": 151936}
LLAMA_8B = {"layers": 32, "D": 4096, "I": 14336, "H": 32, "G": 8, "V": 128256}


def random_llama(case: Any, seed: int, **more: Any) -> LlamaForCausalLM:
    """With V, D, I, layers, H, G, K, dtype and device of the case; ``more`` goes to the config."""
    config = LlamaConfig(
        vocab_size=case.V,
        hidden_size=case.D,
        intermediate_size=case.I,
        num_hidden_layers=case.layers,
        num_attention_heads=case.H,
        num_key_value_heads=case.G,
        head_dim=case.K,
        initializer_range=case.D**-0.5,
        tie_word_embeddings=False,
        dtype=case.dtype,
        **more,
    )
    torch.manual_seed(seed)
    with torch.device(case.device):
        return LlamaForCausalLM(config).to(case.dtype)
