"""The contents of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.config import ThoughtConfig


@dataclass
class Contents:
    """A language model with its thought parts.

    Attributes:
        tensors: the thought parts by name: mixing head, start and end vectors, a gate, a copied base model.
        base: a fingerprint of the weights that the model's adapters belong to; None where there are no adapters.
    """

    model: PreTrainedModel
    config: ThoughtConfig
    tokenizer: PreTrainedTokenizerBase | None
    tensors: dict[str, Tensor]
    base: dict[str, str] | None = None
