"""A Llama with random weights, for benchmarks of whole models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.harness.case import Case

# Shapes of models that people train; Llamas all the same.
SMOLLM2_135M = {"layers": 30, "D": 576, "I": 1536, "H": 9, "G": 3, "V": 49152}
QWEN3_600M = {"layers": 28, "D": 1024, "I": 3072, "H": 16, "G": 8, "width": 128, "V": 151936}
LLAMA_8B = {"layers": 32, "D": 4096, "I": 14336, "H": 32, "G": 8, "V": 128256}


@dataclass(frozen=True, kw_only=True)
class LlamaCase(Case):
    """A case with a Llama of random weights.

    Attributes:
        I: width of the feed-forward layers.
        width: of a head, D/H if 0.
    """

    rotates: ClassVar[bool] = False
    layers: int = 4
    D: int = 256
    I: int = 768
    H: int = 4
    G: int = 2
    V: int = 2048
    width: int = 0

    @property
    def K(self) -> int:
        return self.width or self.D // self.H

    @property
    def matrices(self) -> int:
        """Weights of all layers."""
        return self.layers * (self.D * self.K * (2 * self.H + 2 * self.G) + 3 * self.D * self.I)


def random_llama(case: LlamaCase, seed: int, kind: type[PreTrainedModel] = LlamaForCausalLM, **more: Any) -> PreTrainedModel:
    """``more`` goes to the config, which for another ``kind`` of model has the same names."""
    config = kind.config_class(
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
        return kind(config).to(case.dtype)
