"""This project's checkpoints: an ordinary Hugging Face checkpoint with the thought parts in separate files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quietstar.checkpoints import adapters, official
from quietstar.checkpoints.contents import Contents
from quietstar.checkpoints.tensors import INDEX, WEIGHTS, check_vocabulary, find, locate_tensors, read_file
from quietstar.config import ThoughtConfig
from quietstar.files.writing import replaced
from quietstar.hf.modules import embeddings, unwrapped

TENSORS, SETTINGS, CARD = "quietstar.safetensors", "quietstar.json", "README.md"
FORMAT = 1


def save(contents: Contents, directory: str | os.PathLike) -> None:
    """Write everything into a temporary folder and rename it to ``directory``; a crash leaves the old or the new one intact."""
    with replaced(directory) as beside:
        if contents.base is None:
            contents.model.save_pretrained(beside)
        else:
            adapters.save(contents.model, beside)
        if contents.tokenizer is not None:
            contents.tokenizer.save_pretrained(beside)
        tensors = {name: x.detach().cpu().contiguous() for name, x in contents.tensors.items()}
        save_file(tensors, beside / TENSORS, metadata={"format": "pt"})
        settings = {
            "format": FORMAT,
            "model_type": contents.model.config.model_type,
            "thought_config": contents.config.to_dict(),
            "base": contents.base,
            "files": {file.name: file.stat().st_size for file in sorted(beside.glob("*.safetensors"))},
        }
        (beside / CARD).write_text(_card(contents))
        (beside / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def thinks(path: str | os.PathLike) -> bool:
    """Whether a folder or hub name holds a model with its thought parts, ours or published."""
    if find(path, SETTINGS) is not None:
        return True
    return any(find(path, name) for name in (WEIGHTS, INDEX)) and official.is_published(path)


def load(path: str | os.PathLike, base: PreTrainedModel | str | None = None, **kwargs: Any) -> Contents:
    """What a checkpoint of ours or a published one holds.

    Args:
        base: what the checkpoint's adapters belong to, where it has adapters; default what it names.
    """
    if base is None and find(path, SETTINGS) is None and official.is_published(path):
        return official.load(path, **kwargs)
    settings = _read_settings(path)
    tensors = _read_thought_tensors(path)
    if os.path.isdir(path):
        _check_sizes(Path(path), settings.get("files", {}))
    if settings.get("base"):
        model = adapters.load(path, settings["base"], base, **kwargs)
    elif base is not None:
        raise ValueError(f"{path}: base is for a checkpoint of adapters, and this one is a whole model")
    else:
        model = _load_model(path, settings, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(path) if find(path, "tokenizer_config.json") else None
    return Contents(model, ThoughtConfig.from_dict(settings["thought_config"]), tokenizer, tensors, settings.get("base"))


def _load_model(path: str | os.PathLike, settings: dict[str, Any], **kwargs: Any) -> PreTrainedModel:
    try:
        vocabulary = AutoConfig.from_pretrained(path).get_text_config().vocab_size
        check_vocabulary(path, locate_tensors(path), vocabulary)
        model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", "use_safetensors": True, **kwargs})
    except (SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: the language model does not load: {error}") from error
    if model.config.model_type != settings["model_type"]:
        raise ValueError(f"{path}: {SETTINGS} belongs to a {settings['model_type']}, the model is a {model.config.model_type}")
    return model


def restore_all(contents: Contents, path: str | os.PathLike) -> None:
    """Copy a checkpoint of the same model and config into the model of ``contents``."""
    settings = _read_settings(path)
    config = ThoughtConfig.from_dict(settings["thought_config"])
    if config != contents.config:
        raise ValueError(f"{path}: it was made with another thought config: {config}")
    if bool(settings.get("base")) != (contents.base is not None):
        kinds = ("a whole model", "adapters alone")
        kinds = kinds if contents.base is not None else kinds[::-1]
        raise ValueError(f"{path}: it holds {kinds[0]}, and this run trains {kinds[1]}")
    if contents.base is not None:
        adapters.check_base(path, settings["base"], contents.model, contents.base)
        adapters.restore(contents.model, path)
        return restore(contents.tensors, _read_thought_tensors(path), path)
    saved = load(path)
    V, own = (len(embeddings(x).weight) for x in (saved.model, contents.model))
    if V != own:
        raise ValueError(f"{path}: it is of a vocabulary of {V} tokens, the model's has {own}")
    contents.model.load_state_dict(saved.model.state_dict())
    restore(contents.tensors, saved.tensors, path)


def restore(own: dict[str, Tensor], tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Replace a model's ``own`` thought tensors by loaded ones; all names and shapes must be as saved."""
    if set(own) != set(tensors):
        raise ValueError(f"{path}: {TENSORS} must hold {sorted(own)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name} must have shape {list(own[name].shape)}, got {list(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name].device)


def drop_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """State dict hook: save a tied parameter under its first name alone."""
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


def _read_settings(path: str | os.PathLike) -> dict[str, Any]:
    file = find(path, SETTINGS)
    if file is None:
        raise ValueError(f"{path}: no {SETTINGS} there, so it is not a QuietStar checkpoint")
    try:
        settings = json.loads(Path(file).read_text())
        known = settings["format"] == FORMAT and isinstance(settings["thought_config"], dict) and settings["model_type"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {SETTINGS} is damaged: {error}") from error
    if not known:
        raise ValueError(f"{path}: {SETTINGS} has format {settings['format']}, this version reads {FORMAT}")
    return settings


def _read_thought_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of ``TENSORS``; in older checkpoints those of the base model are named "reference"."""
    return {re.sub(r"^reference\.", "base_model.", name): x for name, x in read_file(path, TENSORS).items()}


def _check_sizes(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = directory / name
        if not file.exists():
            raise ValueError(f"{directory}: {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{directory}: {name} is damaged: it has {file.stat().st_size} bytes, {size} were saved")


def _card(contents: Contents) -> str:
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
