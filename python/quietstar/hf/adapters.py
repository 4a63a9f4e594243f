"""Adapters (LoRA, arXiv 2106.09685, and other kinds) in a live model, through peft: adding, checking, switching off, merging.

The base model is frozen. ``checkpoints/adapters.py`` saves and loads adapters without it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.config import AdapterConfig
from quietstar.files.reading import reason_of
from quietstar.hf.lm_head import note_tie
from quietstar.hf.modules import unwrapped
from quietstar_kernels.checks import refusal

if TYPE_CHECKING:
    from peft import PeftConfig

# peft's name for the only adapter.
NAME = "default"
# Values of the base's weights in its fingerprint, spread over all matrices.
SAMPLES = 1024
# Values of init_lora_weights that leave the base's own weights unchanged.
INITIALIZATIONS = (True, False, "gaussian", "eva", "mica")
# Attributes of peft's modules that hold a module of the base.
_WRAPPED = {"base_layer", "original_module", "token_adapter"}


def require_peft() -> Any:
    """The peft package. Raises ValueError, with the command that installs it, if it is missing."""
    # It imports bitsandbytes, which on some CPUs warns that a kernel of its own for weights in 4 bits is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise ValueError("adapters need peft: pip install -e '.[lora]' in a checkout") from error
    return peft


def there(model: nn.Module) -> bool:
    """Whether a language model has adapters from peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def add(model: PreTrainedModel, config: PeftConfig | AdapterConfig) -> PreTrainedModel:
    """The model with new adapters and its own weights frozen."""
    peft = require_peft()
    if not isinstance(config, (AdapterConfig, peft.PeftConfig)):
        raise refusal("config", "an AdapterConfig or a PeftConfig", config)
    if there(model):
        raise ValueError("the model already has adapters; train them further, or merge them before adding new ones")
    if isinstance(config, AdapterConfig):
        names = [name.strip() for name in config.lora_targets.split(",")]
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=names[0] if names == ["all-linear"] else names,
        )
    _check_kind(config)
    try:
        with_adapters = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"no adapters fit {type(model).__name__}: {reason_of(error)}") from error
    try:
        check(with_adapters)
    except ValueError:
        with_adapters.unload()
        raise
    return with_adapters


def check(model: nn.Module) -> None:
    """Raises ValueError, with the reason, for adapters that thoughts can't run through or that can't be saved by themselves."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("adapters must come from peft.get_peft_model, not from add_adapter or a folder of adapters")
    if not there(model):
        return
    configs: dict[str, Any] = dict(model.peft_config)  # type: ignore[arg-type]
    if list(configs) != [NAME]:
        raise ValueError(f"a model must have one adapter, called {NAME!r}, got {', '.join(map(repr, configs))}")
    _check_kind(configs[NAME])
    if not isinstance(unwrapped(model).get_output_embeddings(), nn.Linear):
        raise ValueError("adapters must leave out the output head: thoughts are sampled from its own weight")
    saved = _saved(model)
    unsaved = [name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) not in saved]
    if unsaved:
        raise ValueError(f"the base must be frozen where adapters are trained, got gradients for {', '.join(unsaved[:3])}")


def check_rows(model: nn.Module) -> None:
    """Raises ValueError for adapters that add or choose rows of the text; a model without adapters passes."""
    for config in getattr(model, "peft_config", {}).values():
        _check_layers_only(config)


def _check_kind(config: Any) -> None:
    _check_layers_only(config)
    initialization = getattr(config, "init_lora_weights", True)
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"init_lora_weights must leave the base unchanged, got {initialization!r}, which changes its weights")


def _check_layers_only(config: Any) -> None:
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapters must change layers only, got {kind}, which changes rows of the text")


def can_be_off(model: nn.Module) -> bool:
    """Whether ``off`` gives the original base: the model has adapters, and none of them trains the base's own biases."""
    return there(model) and getattr(model.peft_config[NAME], "bias", "none") == "none"  # type: ignore[index]


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Run only the base inside the context. peft also switches the adapters' gradients off; here they stay as they were."""
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]

    def restore_gradients() -> None:
        for weight, flag in trained:
            weight.requires_grad_(flag)

    try:
        with model.disable_adapter():  # type: ignore[operator]
            restore_gradients()
            yield
    finally:
        restore_gradients()


def active_state(model: nn.Module) -> tuple:
    """What a forward through the adapters depends on besides weights: which are on, which are merged, and their scaling."""
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
    """The base with the adapters merged into its weights, which can be trained again."""
    if not there(model):
        raise ValueError("merge_adapters: the model has no adapters")
    from peft.tuners.tuners_utils import BaseTunerLayer

    weights = [id(layer.get_base_layer().weight) for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if len({*weights}) < len(weights):  # as in Zamba 2
        raise ValueError("merge_adapters: layers that share a weight have adapters of their own: one weight can't hold all")
    embed: Any = unwrapped(model).get_input_embeddings()
    head = unwrapped(model).get_output_embeddings()
    if hasattr(embed, "base_layer") and embed.get_base_layer().weight is head.weight:  # the head has no part in what is merged
        head.weight = nn.Parameter(head.weight.detach().clone())
    merged: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    note_tie(merged)
    for weight in merged.parameters():
        weight.requires_grad_(weight.is_floating_point())
    return merged


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, str]:
    """A hash of the names and shapes of the base's matrices, and a sample of their values, fp32 in base 64.

    Vectors are left out because adapters may train biases, and quantised weights because they may be repacked at run time.
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


def _saved(model: nn.Module) -> set[int]:
    """The ``id`` of every parameter that a checkpoint of the adapters holds."""
    from peft import get_peft_model_state_dict

    parameters = dict(model.named_parameters())
    return {id(x) for x in get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False).values()}


def _base_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The base's matrices, by their names without adapters."""
    saved = _saved(model) if there(model) else set()
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPED): weight
        for name, weight in unwrapped(model).named_parameters()
        if weight.ndim >= 2 and weight.is_floating_point() and id(weight) not in saved
    }
