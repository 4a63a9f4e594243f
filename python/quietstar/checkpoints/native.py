"""Saving and loading: an ordinary Hugging Face checkpoint with the thought parts in files of their own beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quietstar.checkpoints import adapters, official
from quietstar.checkpoints.tensors import INDEX, WEIGHTS, check_vocabulary, find, locate_tensors, read_file
from quietstar.config import ThoughtConfig
from quietstar.files import replaced
from quietstar.hf.modules import embeddings, unwrapped

if TYPE_CHECKING:
    from quietstar.model import QuietStar

TENSORS, SETTINGS, CARD = "quietstar.safetensors", "quietstar.json", "README.md"
FORMAT = 1


def save(qs: QuietStar, directory: str | os.PathLike) -> None:
    """Write everything into a new folder beside ``directory``, then put it in its place; a crash leaves one of both whole."""
    with replaced(directory) as beside:
        if qs.base is None:
            qs.model.save_pretrained(beside)
        else:
            adapters.save(qs.model, beside)
        if qs.tokenizer is not None:
            qs.tokenizer.save_pretrained(beside)
        tensors = {name: x.detach().cpu().contiguous() for name, x in _own_tensors(qs).items()}
        save_file(tensors, beside / TENSORS, metadata={"format": "pt"})
        settings = {
            "format": FORMAT,
            "model_type": qs.model.config.model_type,
            "thought_config": qs.thought_config.to_dict(),
            "base": qs.base,
            "files": {file.name: file.stat().st_size for file in sorted(beside.glob("*.safetensors"))},
        }
        (beside / CARD).write_text(_card(qs))
        (beside / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def thinks(path: str | os.PathLike) -> bool:
    """Whether a folder or hub name holds a model with its thought parts, ours or published."""
    if find(path, SETTINGS) is not None:
        return True
    return any(find(path, name) for name in (WEIGHTS, INDEX)) and official.is_published(path)


def load(
    path: str | os.PathLike, base: PreTrainedModel | str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, ThoughtConfig, PreTrainedTokenizerBase | None, dict[str, Tensor]]:
    """The language model, the config, the tokenizer if one was saved, and the thought tensors; of a published checkpoint too.

    Args:
        base: what the checkpoint's adapters belong to, where it has adapters; default what it names.
    """
    if base is None and find(path, SETTINGS) is None and official.is_published(path):
        return official.load(path, **kwargs)
    settings = _read_settings(path)
    tensors = read_file(path, TENSORS)
    if os.path.isdir(path):
        _check_sizes(Path(path), settings.get("files", {}))
    if settings.get("base"):
        model = adapters.load(path, settings["base"], base, **kwargs)
    elif base is not None:
        raise ValueError(f"{path}: base is for a checkpoint of adapters, and this one is a whole model")
    else:
        model = _load_model(path, settings, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(path) if find(path, "tokenizer_config.json") else None
    return model, ThoughtConfig.from_dict(settings["thought_config"]), tokenizer, tensors


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


def restore_all(qs: QuietStar, path: str | os.PathLike) -> None:
    """Copy a checkpoint of the same model and config into ``qs``."""
    settings = _read_settings(path)
    config = ThoughtConfig.from_dict(settings["thought_config"])
    if config != qs.thought_config:
        raise ValueError(f"{path}: it was made with another thought config: {config}")
    if bool(settings.get("base")) != (qs.base is not None):
        kinds = ("a whole model", "adapters alone")
        kinds = kinds if qs.base is not None else kinds[::-1]
        raise ValueError(f"{path}: it holds {kinds[0]}, and this run trains {kinds[1]}")
    if qs.base is not None:
        adapters.check_base(path, settings["base"], qs.model, qs.base)
        adapters.restore(qs.model, path)
        return restore(qs, read_file(path, TENSORS), path)
    model, _, _, tensors = load(path)
    saved, own = (len(embeddings(x).weight) for x in (model, qs.model))
    if saved != own:
        raise ValueError(f"{path}: it is of a vocabulary of {saved} tokens, the model's has {own}")
    qs.model.load_state_dict(model.state_dict())
    restore(qs, tensors, path)


def restore(qs: QuietStar, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copy loaded thought tensors into ``qs``; all names and shapes must be as saved."""
    own = _own_tensors(qs)
    if set(own) != set(tensors):
        raise ValueError(f"{path}: {TENSORS} must hold {sorted(own)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name} must have shape {list(own[name].shape)}, got {list(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].data = tensor.to(own[name].device)


def drop_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """State dict hook: a tied parameter is saved under its first name alone."""
    for alias in _tied(module):
        state.pop(prefix + alias, None)


def add_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Load hook: a tied parameter's other names get back the tensor of its first."""
    for alias, name in _tied(module).items():
        if prefix + name in state:
            state.setdefault(prefix + alias, state[prefix + name])


def _tied(module: nn.Module) -> dict[str, str]:
    """Every further name of a parameter, to its first."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(x), name) for name, x in module.named_parameters(remove_duplicate=False)}
    return {alias: name for alias, name in names.items() if alias != name}


def _own_tensors(qs: QuietStar) -> dict[str, Tensor]:
    return {name: x for name, x in qs.named_parameters() if not name.startswith("model.")}


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


def _check_sizes(directory: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = directory / name
        if not file.exists():
            raise ValueError(f"{directory}: {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{directory}: {name} is damaged: it has {file.stat().st_size} bytes, {size} were saved")


def _card(qs: QuietStar) -> str:
    config = qs.thought_config
    name = type(unwrapped(qs.model)).__name__
    if qs.base is None:
        what = "`AutoModelForCausalLM.from_pretrained` loads the language model alone"
    else:
        base = qs.model.name_or_path or name
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
