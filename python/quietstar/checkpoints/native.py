"""This project's checkpoints: an ordinary Hugging Face checkpoint with the thought parts in separate files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.checkpoints import adapters, official
from quietstar.checkpoints.contents import (
    INDEX,
    WEIGHTS,
    Contents,
    TrainedOn,
    check_finite,
    check_vocabulary,
    find,
    has_safetensors,
    locate_tensors,
    read_file,
)
from quietstar.checkpoints.places import checkpoint_of, is_gguf
from quietstar.checkpoints.pretrained import load_config, load_model, load_tokenizer, save_model, save_tokenizer
from quietstar.config import ThoughtConfig, read_thought_config
from quietstar.files.reading import as_type, check_names, check_saved, read_json, sha256
from quietstar.files.writing import replaced
from quietstar.hf.modules import embeddings, unwrapped

TENSORS, SETTINGS = "quietstar.safetensors", "quietstar.json"
FORMAT = 1
# Files of text that people edit after saving, and that no number depends on while a model trains or thinks.
EDITED = re.compile(r"README\.md|generation_config\.json|tokenizer_config\.json|special_tokens_map\.json|.*\.jinja")


@dataclass
class Settings:
    """quietstar.json."""

    model_type: str
    thought_config: dict[str, Any]
    files: dict[str, int]  # sizes in bytes
    sha256: dict[str, str]  # of files that must be as they were saved
    trained_on: tuple[TrainedOn, ...]  # the texts of the runs that the model comes from
    checksum: str  # SHA-256 of all other settings
    base: adapters.Fingerprint | None = None  # the fingerprint of the adapters' base

    def __post_init__(self) -> None:
        if any(size < 0 for size in self.files.values()):
            raise ValueError("files must have sizes of 0 or more")


def save(contents: Contents, directory: str | os.PathLike, max_shard_size: int | str = "50GB") -> None:
    """Write everything into a temporary folder and rename it to ``directory``; a crash leaves the old or the new one intact."""
    with replaced(directory) as beside:
        write(contents, beside, max_shard_size)


def write(contents: Contents, folder: Path, max_shard_size: int | str = "50GB") -> dict[str, str]:
    """Write everything into an empty folder; returns the SHA-256 of the files that have one in ``SETTINGS``."""
    if contents.base is None:
        save_model(contents.model, contents.tokenizer, folder, max_shard_size=max_shard_size)
    else:
        adapters.save(contents.model, folder)
        save_tokenizer(contents.tokenizer, folder)
    tensors = {name: x.detach().cpu().contiguous() for name, x in contents.tensors.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / "README.md").write_text(_card(contents), encoding="utf-8")
    kept = [file for file in sorted(folder.iterdir()) if file.is_file() and not EDITED.fullmatch(file.name)]
    hashes = {file.name: sha256(file) for file in kept}
    settings = {
        "format": FORMAT,
        "model_type": contents.model.config.model_type,
        "thought_config": contents.config.to_dict(),
        "base": contents.base,
        "files": {file.name: file.stat().st_size for file in kept},
        "sha256": hashes,
        "trained_on": [asdict(run) for run in contents.trained_on],
    }
    (folder / SETTINGS).write_text(json.dumps({**settings, "checksum": _checksum(settings)}, indent=2) + "\n", encoding="utf-8")
    _write_index(folder)  # which has no hash, since nothing is read by it here
    return hashes


def _write_index(folder: Path) -> None:
    """Name the weights in an index even where they are one file: without one, vLLM and SGLang read every safetensors file."""
    if (folder / WEIGHTS).exists():  # not adapters, or shards, which have an index
        located = {name: WEIGHTS for name in locate_tensors(folder)}
        index = {"metadata": {"total_size": (folder / WEIGHTS).stat().st_size}, "weight_map": located}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _checksum(settings: dict[str, Any]) -> str:
    others = {name: value for name, value in settings.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def thinks(path: str | os.PathLike) -> bool:
    """Whether a folder or hub name holds a model with its thought parts, ours or published."""
    path = checkpoint_of(path)
    return find(path, SETTINGS) is not None or (has_safetensors(path) and official.is_published(path))


def load(path: str | os.PathLike, base: PreTrainedModel | str | None = None, verify: bool = True, **kwargs: Any) -> Contents:
    """What a checkpoint of ours or a published one holds."""
    path = checkpoint_of(path)
    if base is None and find(path, SETTINGS) is None and not is_gguf(path) and official.is_published(path):
        _check_not_bare(path)
        return official.load(path, **kwargs)
    settings = _read_settings(path, verify)
    tensors = _read_thought_tensors(path)
    if settings.base:
        model = adapters.load(path, settings.base, base, **kwargs)
    elif base is not None:
        raise ValueError(f"{path}: base is for a checkpoint of adapters, and this one is a whole model")
    else:
        check_vocabulary(path, locate_tensors(path), load_config(path).get_text_config().vocab_size)
        model = load_model(path, **kwargs)
        if model.config.model_type != settings.model_type:
            wanted = f"{SETTINGS} belongs to a {settings.model_type}"
            raise ValueError(f"{path}: {wanted}, the model is a {model.config.model_type}")
    tokenizer = load_tokenizer(path) if find(path, "tokenizer_config.json") else None
    config = read_thought_config(settings.thought_config, f"{path}: {SETTINGS}")
    return Contents(model, config, tokenizer, tensors, trained_on=settings.trained_on)


def read_description(path: str | os.PathLike) -> tuple[ThoughtConfig, tuple[TrainedOn, ...]] | None:
    """What a checkpoint of ours says about itself: how it thinks, and what it was trained on. Its weights are not looked for.

    None where there is no ``SETTINGS``, as for a plain language model or a published checkpoint.
    """
    path = checkpoint_of(path)
    file = find(path, SETTINGS)
    if file is None:
        return None
    where = f"{path}: {SETTINGS}"
    settings = as_type(Settings, read_json(file, dict[str, Any]), f"{where} is damaged")
    return read_thought_config(settings.thought_config, where), settings.trained_on


def restore_all(contents: Contents, path: str | os.PathLike, verify: bool = True) -> None:
    """Copy a checkpoint of the same model and config into the model of ``contents``."""
    settings = _read_settings(path, verify)
    config = read_thought_config(settings.thought_config, f"{path}: {SETTINGS}")
    if config != contents.config:
        raise ValueError(f"{path}: it was made with another thought config: {config}")
    if bool(settings.base) != (contents.base is not None):
        kinds = ("a whole model", "adapters alone")
        kinds = kinds if contents.base is not None else kinds[::-1]
        raise ValueError(f"{path}: it holds {kinds[0]}, and this run trains {kinds[1]}")
    if settings.base and contents.base is not None:
        adapters.check_base(path, settings.base, contents.model, contents.base)
        adapters.restore(contents.model, path)
        return restore(contents.tensors, _read_thought_tensors(path), path)
    saved = load(path, verify=False)
    V, own = (len(embeddings(x).weight) for x in (saved.model, contents.model))
    if V != own:
        raise ValueError(f"{path}: it has a vocabulary of {V} tokens, the model one of {own}")
    if len({x.model.get_output_embeddings().weight is embeddings(x.model).weight for x in (saved, contents)}) > 1:
        raise ValueError(f"{path}: it is from another model: one output head is tied to the embeddings and the other isn't")
    contents.model.load_state_dict(saved.model.state_dict())
    restore(contents.tensors, saved.tensors, path)


def restore(own: dict[str, Tensor], tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Replace a model's ``own`` thought tensors by loaded ones; all names and shapes must be as saved."""
    if set(own) != set(tensors):
        raise ValueError(f"{path}: {TENSORS} must hold {sorted(own)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name} must have shape {list(own[name].shape)}, got {list(tensor.shape)}")
        if own[name].dtype != tensor.dtype:
            warnings.warn(f"{path}: {name} is {tensor.dtype}, converted to {own[name].dtype}", stacklevel=2)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name].device, own[name].dtype)


def drop_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """State dict hook: save a tied parameter only under its first name."""
    for alias in _tied(module):
        state.pop(prefix + alias, None)


def add_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load hook: give a tied parameter's other names the tensor of its first."""
    for alias, name in _tied(module).items():
        if prefix + name in state:
            state.setdefault(prefix + alias, state[prefix + name])


def _tied(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter, to its first."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(x), name) for name, x in module.named_parameters(remove_duplicate=False)}
    return {alias: name for alias, name in names.items() if alias != name}


def _read_settings(path: str | os.PathLike, verify: bool) -> Settings:
    """The settings of a checkpoint whose files are all there."""
    file = find(path, SETTINGS)
    if file is None:
        remedy = f"quietstar train --model {path} makes one of a language model"
        raise ValueError(f"{path}: no {SETTINGS} there, so it is not a QuietStar checkpoint: {remedy}")
    where = f"{path}: {SETTINGS}"
    values = read_json(file, dict[str, Any])
    if values.get("format") != FORMAT:
        raise ValueError(f"{where} has format {values.get('format')}, this version reads {FORMAT}")
    settings = as_type(Settings, values, f"{where} is damaged")
    check_names(where, {**settings.files, **settings.sha256})
    if not verify:
        weights = {name: size for name, size in settings.files.items() if name.endswith(".safetensors")}
        check_saved(path, partial(find, path), weights, {})
        return settings
    if settings.checksum != _checksum(values):
        raise ValueError(f"{where} is damaged: it is not what was saved")
    check_saved(path, partial(find, path), settings.files, settings.sha256)
    return settings


def _check_not_bare(path: str | os.PathLike) -> None:
    """Raises ValueError for what transformers' own Trainer writes of a wrapper: all tensors under the wrapper's names."""
    if any(name.startswith("mixing_head.") for name in locate_tensors(path)):
        raise ValueError(
            f"{path}: a state dict without configs, as a plain Trainer writes it: make the model anew and use its "
            "load_state_dict, and train with quietstar.trainer.ThoughtTrainer, whose checkpoints load"
        )


def _read_thought_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    tensors = read_file(path, TENSORS)
    check_finite(path, TENSORS, tensors)
    return tensors


def _card(contents: Contents) -> str:
    """The text of README.md."""
    config = contents.config
    name = type(unwrapped(contents.model)).__name__
    if contents.base is None:
        what = "`AutoModelForCausalLM.from_pretrained` loads the language model alone"
    else:
        base = contents.model.name_or_path or name
        what = f"These are adapters of peft, without the model that they belong to, {base}"
    return f"""---
library_name: transformers
tags: [quiet-star]
---

# {name} that thinks before every token

A {name} trained with Quiet-STaR (arXiv 2403.09629) by quietstar-kernels: {config.thoughts} thoughts of
{config.thought_tokens} tokens at every position, {config.lookahead} tokens predicted after each, preset `{config.preset}`.

{what}; `quietstar.QuietStar.from_pretrained` loads all of it, with the
mixing head and thought embeddings (`{TENSORS}`, `{SETTINGS}`).

## Limits

A thought need not be the reason for an answer: it was rewarded for making the next tokens likelier, nothing else. Nothing
guards against harmful thoughts, and they are not meant to be shown as explanations.
"""
