"""The contents of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.config import ThoughtConfig


@dataclass(frozen=True)
class TrainedOn:
    """The texts of a training run, so that what it held out is found again.

    Attributes:
        base: the model that the run began with, a folder or a hub name.
        data: the fields of ``quietstar.data.texts.DataConfig``; a file by its whole path.
        texts: how many texts there were to train on and to hold out.
        sha256: of these texts, in their order.
        held_out: how many examples were held out.
    """

    base: str
    data: dict[str, Any]
    texts: int
    sha256: str
    held_out: int


@dataclass
class Contents:
    """A language model with its thought parts.

    Attributes:
        tensors: the thought parts by name: mixing head, start and end vectors, a gate, a copied base model.
        base: a fingerprint of the weights that the model's adapters belong to; None where there are no adapters.
        trained_on: the texts of the runs that the model comes from, the last one's last; empty where that is not known.
    """

    model: PreTrainedModel
    config: ThoughtConfig
    tokenizer: PreTrainedTokenizerBase | None
    tensors: dict[str, Tensor]
    base: dict[str, str] | None = None
    trained_on: tuple[TrainedOn, ...] = ()
