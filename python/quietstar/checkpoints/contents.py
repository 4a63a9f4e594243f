"""What a checkpoint holds, and which of its files holds which tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from quietstar.checkpoints.places import is_gguf
from quietstar.config import ThoughtConfig
from quietstar.files.reading import check_names, check_regular, read_json, reason_of
from quietstar_kernels.checks import FLOATS


@dataclass(frozen=True)
class TrainedOn:
    """The texts of a training run, so that what it held out is found again."""

    base: str  # the model that the run began with, a folder or a hub name
    data: dict[str, Any]  # the fields of ``quietstar.data.texts.DataConfig``; a file by its whole path
    texts: int  # how many texts there were to train on and to hold out
    sha256: str  # of these texts, in their order
    held_out: int  # how many examples were held out
    inputs: dict[str, str] = field(default_factory=dict)  # hashes of what else a resumed run reads again, by what to call it


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


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# The first of these that a checkpoint has gives the size of its vocabulary.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass
class Index:
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


def find(path: str | os.PathLike, name: str) -> str | None:
    """The local path of one file of a checkpoint, which is a folder or a hub name; None if there is no such file."""
    if is_gguf(path):
        return None
    if os.path.isfile(path):
        is_pickle = str(path).endswith(PICKLES)
        raise ValueError(_pickle_message(path, [Path(path).name]) if is_pickle else f"{path}: a file, not a folder")
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"{path}: not a folder, nor a hub model that can be reached: {reason_of(error)}") from error


def locate_tensors(path: str | os.PathLike) -> dict[str, str]:
    """The file that holds each tensor of a model's weights, by tensor name: one safetensors file, or the shards of an index."""
    whole = find(path, WEIGHTS)
    if whole is not None:
        with _opened(path, whole) as file:
            return dict.fromkeys(file.keys(), whole)
    index = find(path, INDEX)
    if index is None:
        pickles = _find_pickles(path)
        raise ValueError(_pickle_message(path, pickles) if pickles else f"{path}: no {WEIGHTS} there")
    try:
        shard_of = read_json(index, Index).weight_map
    except ValueError as error:
        raise ValueError(f"{path}: {INDEX} is damaged: {error}") from error
    check_names(f"{path}: {INDEX}", shard_of.values())
    shards = {name: find(path, name) for name in sorted(set(shard_of.values()))}
    for name, shard in shards.items():
        if shard is None:
            raise ValueError(f"{path}: {name} is missing, which {INDEX} names")
    return {tensor: str(shards[name]) for tensor, name in shard_of.items()}


def has_safetensors(path: str | os.PathLike) -> bool:
    """Whether there are weights in safetensors."""
    return any(find(path, name) for name in (WEIGHTS, INDEX))


def read_file(path: str | os.PathLike, name: str) -> dict[str, Tensor]:
    """All tensors in one file of a checkpoint. Raises ValueError if the file is missing or damaged."""
    file = find(path, name)
    if file is None:
        raise ValueError(f"{path}: {name} is missing")
    with _opened(path, file) as opened:
        tensors = opened.keys()
        return {tensor: opened.get_tensor(tensor) for tensor in tensors}


def read_tensors(path: str | os.PathLike, located: Mapping[str, str], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors called ``names``, each from the file that ``located`` gives."""
    tensors = {}
    for name in names:
        with _opened(path, located[name]) as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def check_finite(path: str | os.PathLike, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor in the file ``name`` that does not hold floats, or holds some that are not finite."""
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {key} in {name} must hold floats, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} in {name} has values that are not finite")


def check_vocabulary(path: str | os.PathLike, located: Mapping[str, str], vocabulary: int) -> None:
    """Raises ValueError if the number of embeddings is not the config's vocabulary size."""
    name = next((name for suffix in EMBEDDINGS for name in located if name.endswith(suffix)), None)
    if name is None:
        return
    with _opened(path, located[name]) as file:
        tokens = file.get_slice(name).get_shape()[0]
    if tokens != vocabulary:
        raise ValueError(f"{path}: its weights have a vocabulary of {tokens} tokens, its config.json says {vocabulary}")


@contextmanager
def _opened(path: str | os.PathLike, file: str) -> Iterator[safe_open]:
    check_regular(file)
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {Path(file).name} is damaged: {error}") from error


def _find_pickles(path: str | os.PathLike) -> list[str]:
    if os.path.isdir(path):
        return sorted(file.name for file in Path(path).iterdir() if file.suffix in PICKLES and file.name != "training_args.bin")
    return [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if find(path, name)]


def _pickle_message(path: str | os.PathLike, names: list[str]) -> str:
    return (
        f"{path}: its weights are pickle files ({', '.join(names[:3])}), which can run code when read; --allow-bin reads those "
        "of a plain language model with weights_only; else convert them with "
        f"safetensors.torch.save_file(torch.load(file, weights_only=True), '{WEIGHTS}', metadata={{'format': 'pt'}})"
    )
