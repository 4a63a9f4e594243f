"""Checkpoints of adapters, in peft's own files, without the base model that they were trained on.

A fingerprint of the base is saved with them, and it is checked when they are loaded.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.checkpoints.contents import check_finite, find, read_file
from quietstar.checkpoints.pretrained import load_model
from quietstar.files.reading import read_json, reason_of
from quietstar.hf.adapters import NAME, check, fingerprint, require_peft
from quietstar.hf.modules import unwrapped

# peft's file names.
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Fields of a saved config that depend on where and how it was saved.
_ENVIRONMENT = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config"}


@dataclass
class Fingerprint:
    """What ``quietstar.hf.adapters.fingerprint`` returns, from a file."""

    shapes: str
    dtype: str
    sample: str


@dataclass
class Base:
    """What adapter_config.json says about the base."""

    base_model_name_or_path: str | None = None


def save(model: Any, directory: Path) -> None:
    """Write the adapters' weights and their config, as peft does. Raises ValueError for adapters that fail ``check``."""
    check(model)
    config = model.peft_config[NAME]
    if config.base_model_name_or_path and os.path.exists(config.base_model_name_or_path):  # found from any working directory
        config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)
    model.save_pretrained(directory, save_embedding_layers=False)


def load(path: str | os.PathLike, saved: Fingerprint, base: PreTrainedModel | str | None, **kwargs: Any) -> PreTrainedModel:
    """The adapters of a checkpoint on their base: ``base``, or the one that the checkpoint names."""
    config, tensors = _read_config(path), read_file(path, TENSORS)
    if isinstance(base, PreTrainedModel):
        model = base
    else:
        name = base or config.base_model_name_or_path
        if not name:
            raise ValueError(f"{path}: its adapters don't name their base: pass base=, a model, a folder or a hub name")
        try:
            model = load_model(name, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: its adapters' base {name} does not load (base= takes another): {error}") from error
    check(model)
    check_base(path, saved, model, fingerprint(model))
    config.inference_mode = False
    halved = all(x.dtype in (torch.float16, torch.bfloat16) for x in tensors.values())
    name = model.name_or_path or config.base_model_name_or_path
    config.base_model_name_or_path = None  # peft takes it from the model, and would warn if the config named another
    try:
        with_adapters = require_peft().get_peft_model(model, config, autocast_adapter_dtype=not halved)
    except Exception as error:  # whatever peft makes of a wrong type
        raise _damaged(path, error) from error
    config.base_model_name_or_path = name
    _copy(tensors, with_adapters, path)
    return with_adapters


def restore(model: Any, path: str | os.PathLike) -> None:
    """Copy a checkpoint's adapters into a model with the same adapters. Raises ValueError if their settings differ."""
    saved, own = (_settings(config) for config in (_read_config(path), model.peft_config[NAME]))
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise ValueError(f"{path}: its adapters were made with {name}={saved.get(name)!r}, not {own.get(name)!r}")
    _copy(read_file(path, TENSORS), model, path)


def check_base(path: str | os.PathLike, saved: Fingerprint, model: PreTrainedModel, own: dict[str, str]) -> None:
    """Raises ValueError if ``own``, the fingerprint of ``model``, differs from the saved one by more than rounding."""
    name = unwrapped(model).name_or_path or type(unwrapped(model)).__name__
    if own["shapes"] != saved.shapes:
        raise ValueError(f"{path}: its adapters belong to another base: the layers of {name} have other names or shapes")
    theirs, ours = _sample(path, saved.sample), _sample(path, own["sample"])
    tolerance = 0.0
    if saved.dtype != own["dtype"]:
        tolerance = max(_precision(path, x) for x in (saved.dtype, own["dtype"]))
    if len(theirs) != len(ours) or not torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance * 1e-3):
        raise ValueError(f"{path}: its adapters belong to another base: the weights of {name} have other values")


def _sample(path: str | os.PathLike, text: str) -> Tensor:
    try:
        return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32)
    except ValueError as error:
        raise ValueError(f"{path}: the fingerprint of its adapters' base is damaged: {error}") from error


def _precision(path: str | os.PathLike, dtype: str) -> float:
    try:
        return torch.finfo(getattr(torch, dtype)).eps
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: the fingerprint of its adapters' base must name a floating-point dtype, got {dtype!r}"
        ) from error


def _copy(tensors: dict[str, Tensor], model: Any, path: str | os.PathLike) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise ValueError(f"{path}: {TENSORS} and {CONFIG} belong to different adapters")
    check_finite(path, TENSORS, tensors)
    set_peft_model_state_dict(model, tensors)


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _ENVIRONMENT}


def _read_config(path: str | os.PathLike) -> Any:
    file = find(path, CONFIG)
    if file is None:
        raise ValueError(f"{path}: {CONFIG} is missing")
    peft = require_peft()
    try:
        read_json(file, Base)
        return peft.PeftConfig.from_pretrained(os.path.dirname(file))
    except Exception as error:  # whatever peft makes of a wrong type
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{path}: {CONFIG} is damaged: {reason_of(error)}")
