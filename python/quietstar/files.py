"""The files of a checkpoint, in a folder or on the hub: which holds which tensor; files and folders that are written whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

__all__ = ["replaced", "write_whole"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# The first of these that a checkpoint has tells the size of its vocabulary.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def find(path: str | os.PathLike, name: str) -> str | None:
    """The local path of one file of a checkpoint, folder or hub name; None where it has none."""
    if os.path.isfile(path):
        raise ValueError(_pickles(path, [Path(path).name]) if str(path).endswith(PICKLES) else f"{path}: a file, not a folder")
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"{path}: not a folder or a hub model within reach: {str(error).splitlines()[0]}") from error


def locate_tensors(path: str | os.PathLike) -> dict[str, str]:
    """The file that holds each tensor of a model's weights, by the tensor's name: one safetensors file, or an index's shards.

    Raises:
        ValueError: no weights, pickled ones, a shard that is missing, or a damaged file.
    """
    whole = find(path, WEIGHTS)
    if whole is not None:
        with _opened(path, whole) as file:
            return dict.fromkeys(file.keys(), whole)
    index = find(path, INDEX)
    if index is None:
        pickles = _find_pickles(path)
        raise ValueError(_pickles(path, pickles) if pickles else f"{path}: no {WEIGHTS} there")
    try:
        shard_of = json.loads(Path(index).read_text())["weight_map"]
        shards = {name: find(path, name) for name in sorted(set(shard_of.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {INDEX} is damaged: {error}") from error
    for name, shard in shards.items():
        if shard is None:
            raise ValueError(f"{path}: {name} is missing, which {INDEX} names")
    return {tensor: str(shards[name]) for tensor, name in shard_of.items()}


def read_file(path: str | os.PathLike, name: str) -> dict[str, Tensor]:
    """All tensors of one file of a checkpoint. Raises ValueError where it is missing or damaged."""
    file = find(path, name)
    if file is None:
        raise ValueError(f"{path}: {name} is missing")
    with _opened(path, file) as opened:
        tensors = opened.keys()
        return {tensor: opened.get_tensor(tensor) for tensor in tensors}


def read_tensors(path: str | os.PathLike, located: Mapping[str, str], names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors alone, each from its file."""
    tensors = {}
    for name in names:
        with _opened(path, located[name]) as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def check_vocabulary(path: str | os.PathLike, located: Mapping[str, str], vocabulary: int) -> None:
    """Raises ValueError where the embeddings have another number of tokens than the config says."""
    name = next((name for suffix in EMBEDDINGS for name in located if name.endswith(suffix)), None)
    if name is None:
        return
    with _opened(path, located[name]) as file:
        tokens = file.get_slice(name).get_shape()[0]
    if tokens != vocabulary:
        raise ValueError(f"{path}: its weights are of a vocabulary of {tokens} tokens, its config.json says {vocabulary}")


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file beside ``path`` and rename it into place, so that no half file is left; text as UTF-8."""
    with beside(path) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def beside(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside ``path`` for a file to write, which is renamed into place at the end; after an error nothing is left."""
    path = Path(path)
    file = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield file
        os.replace(file, path)
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def replaced(directory: str | os.PathLike, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder beside ``directory``, put in its place at the end; a crash leaves one of both whole.

    Files of the old folder move over, but for weights, their index and those named by ``stale``.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        beside.chmod(0o755)
        yield beside
        _put_in_place(beside, directory, {INDEX, *stale})
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put_in_place(beside: Path, directory: Path, stale: set[str]) -> None:
    if not directory.exists():
        os.replace(beside, directory)
        return
    old = beside.with_name(beside.name + "-old")
    os.replace(directory, old)
    os.replace(beside, directory)
    for file in old.iterdir():
        if not (directory / file.name).exists() and file.suffix != ".safetensors" and file.name not in stale:
            os.replace(file, directory / file.name)
    shutil.rmtree(old)


@contextmanager
def _opened(path: str | os.PathLike, file: str) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {Path(file).name} is damaged: {error}") from error


def _find_pickles(path: str | os.PathLike) -> list[str]:
    if os.path.isdir(path):
        return sorted(file.name for file in Path(path).iterdir() if file.suffix in PICKLES and file.name != "training_args.bin")
    return [name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if find(path, name)]


def _pickles(path: str | os.PathLike, names: list[str]) -> str:
    return (
        f"{path}: its weights are pickle files ({', '.join(names[:3])}), which can run code when read: convert them with "
        f"safetensors.torch.save_file(torch.load(file, weights_only=True), '{WEIGHTS}', metadata={{'format': 'pt'}})"
    )
