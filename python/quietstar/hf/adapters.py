"""Adapters (LoRA, arXiv 2106.09685, and its relatives) through peft: the base is frozen, and saved only as a fingerprint.

A checkpoint holds the adapters' weights alone, so the base that they were trained on must be there when they are loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quietstar.config import AdapterConfig
from quietstar.files import find, read_file
from quietstar.hf.modules import unwrapped

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["add", "merge"]

# peft's names.
TENSORS, CONFIG, NAME = "adapter_model.safetensors", "adapter_config.json", "default"
# Of the base's weights, spread over all of its matrices.
SAMPLES = 1024
# Starts that leave the base's own weights alone.
STARTS = (True, False, "gaussian", "eva", "mica")
# What peft calls a module of the base inside one of its own.
_WRAPS = {"base_layer", "original_module", "token_adapter"}
# What a saved config says about its surroundings.
_ELSEWHERE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config"}


def there(model: nn.Module) -> bool:
    """Whether peft has put adapters into a language model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add(model: PreTrainedModel, config: PeftConfig | AdapterConfig) -> PreTrainedModel:
    """The model with new adapters, its own weights frozen.

    Raises:
        ValueError: peft is not installed, the model has adapters already, or no layer is called as the config says.
    """
    peft = _peft()
    if there(model):
        raise ValueError("the model has adapters already, which are trained further: leave out new ones, or merge those first")
    wanted = _lora(config) if isinstance(config, AdapterConfig) else config
    _check_kind(wanted)
    try:
        with_adapters = peft.get_peft_model(model, wanted)
    except ValueError as error:
        raise ValueError(f"no adapters fit {type(model).__name__}: {str(error).splitlines()[0]}") from error
    try:
        check(with_adapters)
    except ValueError:
        with_adapters.unload()
        raise
    return with_adapters


def check(model: nn.Module) -> None:
    """Raises ValueError, with the reason, for adapters that thoughts can't go through or that can't be saved alone."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("adapters must come from peft.get_peft_model, got those of add_adapter or of a folder of adapters")
    if not there(model):
        return
    configs: dict[str, Any] = dict(model.peft_config)  # type: ignore[arg-type]
    if list(configs) != [NAME]:
        raise ValueError(f"a model must have one adapter, called {NAME!r}, got {', '.join(map(repr, configs))}")
    _check_kind(configs[NAME])
    if not isinstance(unwrapped(model).get_output_embeddings(), nn.Linear):
        raise ValueError("adapters must leave out the output head, whose own weight thoughts are sampled from")
    if lost := _unsaved(model):
        raise ValueError(f"the base must be frozen where adapters are trained, got gradients for {', '.join(lost[:3])}")


def _check_kind(config: Any) -> None:
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapters must change layers alone, got {kind}, which changes rows of the text")
    start = getattr(config, "init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(f"init_lora_weights must leave the base as it is, got {start!r}, which changes its weights")


def can_be_off(model: nn.Module) -> bool:
    """Whether ``off`` gives the base as it was: there are adapters, and none trains the base's own biases."""
    return there(model) and getattr(model.peft_config[NAME], "bias", "none") == "none"  # type: ignore[index]


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """The base alone inside. peft switches gradients of all adapter weights too; each keeps what it had."""
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]

    def keep() -> None:
        for weight, flag in trained:
            weight.requires_grad_(flag)

    try:
        with model.disable_adapter():  # type: ignore[operator]
            keep()
            yield
    finally:
        keep()


def switches(model: nn.Module) -> tuple:
    """What decides, beside weights, how a forward goes through adapters: which are on, merged already, and how strong."""
    if not there(model):
        return ()
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    return tuple(
        (
            layer._disable_adapters,
            *layer.active_adapters,
            *getattr(layer, "merged_adapters", ()),
            *getattr(layer, "scaling", {}).values(),
        )
        for layer in layers
    )


def merge(model: nn.Module) -> PreTrainedModel:
    """The base with the adapters folded into its weights, which may be trained again."""
    if not there(model):
        raise ValueError("merge_adapters: the model has no adapters")
    merged: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    for weight in merged.parameters():
        weight.requires_grad_(weight.is_floating_point())
    return merged


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str]:
    """Names and shapes of the base's matrices, hashed, and a sample of their values, as fp32 in base 64.

    Vectors are left out, since adapters may train biases, and so are quantised weights, which may be packed anew as they run.
    """
    weights = _base_matrices(model)
    shapes = json.dumps({name: list(weight.shape) for name, weight in weights.items()})
    each = max(1, SAMPLES // len(weights))
    places = (torch.arange(each, dtype=torch.float64) + 0.5) / each
    sample = [w.detach().flatten()[(places * w.numel()).long().to(w.device)].float().cpu() for w in weights.values()]
    kinds = {w.dtype for w in weights.values()}
    return {
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "dtype": str(max(kinds, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch."),
        "sample": base64.b64encode(torch.cat(sample).numpy().tobytes()).decode(),
    }


def check_base(path: str | os.PathLike, saved: dict[str, str], model: nn.Module, own: dict[str, str]) -> None:
    """Raises ValueError where ``own``, the fingerprint of ``model``, is not the saved one, but for a dtype's rounding."""
    name = unwrapped(model).name_or_path or type(unwrapped(model)).__name__
    if own["shapes"] != saved["shapes"]:
        raise ValueError(f"{path}: its adapters belong to another base: the layers of {name} have other names or shapes")
    theirs, ours = (torch.frombuffer(bytearray(base64.b64decode(x["sample"])), dtype=torch.float32) for x in (saved, own))
    tolerance = 0.0
    if saved["dtype"] != own["dtype"]:
        tolerance = max(torch.finfo(getattr(torch, x["dtype"])).eps for x in (saved, own))
    if not torch.allclose(theirs, ours, rtol=tolerance, atol=tolerance * 1e-3):
        raise ValueError(f"{path}: its adapters belong to another base: the weights of {name} have other values")


def save(model: Any, directory: Path) -> None:
    """peft's own files: the adapters' weights and their config."""
    check(model)
    config = model.peft_config[NAME]
    if config.base_model_name_or_path and os.path.isdir(config.base_model_name_or_path):  # so that any folder finds it
        config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)
    model.save_pretrained(directory, save_embedding_layers=False)


def load(path: str | os.PathLike, saved: dict[str, str], base: PreTrainedModel | str | None, **kwargs: Any) -> PreTrainedModel:
    """Adapters of a checkpoint on their base: ``base``, or what the checkpoint names.

    Raises:
        ValueError: the base isn't there, is another one, or the adapters are damaged.
    """
    config, tensors = _read_config(path), read_file(path, TENSORS)
    if isinstance(base, PreTrainedModel):
        model = base
    else:
        name = base or config.base_model_name_or_path
        if not name:
            raise ValueError(f"{path}: its adapters don't name their base: give base=, a model, a folder or a hub name")
        try:
            model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", "use_safetensors": True, **kwargs})
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: its adapters' base {name} does not load (base= takes another): {reason}") from error
    check(model)
    check_base(path, saved, model, fingerprint(model))
    config.inference_mode = False
    halved = all(x.dtype in (torch.float16, torch.bfloat16) for x in tensors.values())
    name = model.name_or_path or config.base_model_name_or_path
    config.base_model_name_or_path = None  # peft takes it from the model alone, and warns of another
    with_adapters = _peft().get_peft_model(model, config, autocast_adapter_dtype=not halved)
    config.base_model_name_or_path = name
    _put(with_adapters, tensors, path)
    return with_adapters


def restore(model: Any, path: str | os.PathLike) -> None:
    """Copy a checkpoint's adapters into those of a model that has the same. Raises ValueError where they differ."""
    saved, own = (_settings(config) for config in (_read_config(path), model.peft_config[NAME]))
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise ValueError(f"{path}: its adapters were made with {name}={saved.get(name)!r}, not {own.get(name)!r}")
    _put(model, read_file(path, TENSORS), path)


def _put(model: Any, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise ValueError(f"{path}: {TENSORS} and {CONFIG} are not of the same adapters")
    set_peft_model_state_dict(model, tensors)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters need peft: pip install 'quietstar-kernels[lora]'") from error
    return peft


def _lora(config: AdapterConfig) -> PeftConfig:
    names = [name.strip() for name in config.lora_targets.split(",")]
    return _peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names[0] if names == ["all-linear"] else names,
    )


def _settings(config: PeftConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _ELSEWHERE}


def _saved(model: nn.Module) -> set[int]:
    """Those of the parameters that a checkpoint of the adapters holds, by ``id``."""
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    return {id(x) for x in get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False).values()}


def _unsaved(model: nn.Module) -> list[str]:
    """Parameters that would be trained and lost."""
    saved = _saved(model)
    return [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in saved]


def _base_matrices(model: nn.Module) -> dict[str, Tensor]:
    """By the names that they have without adapters."""
    saved = _saved(model) if there(model) else set()
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPS): weight
        for name, weight in unwrapped(model).named_parameters()
        if weight.ndim >= 2 and weight.is_floating_point() and id(weight) not in saved
    }


def _read_config(path: str | os.PathLike) -> Any:
    file = find(path, CONFIG)
    if file is None:
        raise ValueError(f"{path}: {CONFIG} is missing")
    try:
        return _peft().PeftConfig.from_pretrained(os.path.dirname(file))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {CONFIG} is damaged: {str(error).splitlines()[0]}") from error
