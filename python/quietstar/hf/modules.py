"""The modules of a Hugging Face language model that the wrapper calls or changes, and whether weights are finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def embeddings(model: PreTrainedModel) -> nn.Embedding:
    """The token embeddings. A call applies the model's scaling and adapters; ``weight`` has neither."""
    return cast(nn.Embedding, model.get_input_embeddings())


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's, with the adapters in its layers; a model without adapters is returned as it is."""
    inner = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if inner is None else inner())


def backbone(model: nn.Module) -> nn.Module:
    """The decoder, whose ``last_hidden_state`` is the input of the output head."""
    model = unwrapped(model)
    return model.base_model if model.base_model is not model else model.model


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model computes: where its token embeddings are, or are moved to for each call, by Accelerate's offloading."""
    embed = embeddings(model)
    moved_to = getattr(getattr(embed, "_hf_hook", None), "execution_device", None)
    return embed.weight.device if moved_to is None else torch.device(moved_to)


def unmark_gguf(model: PreTrainedModel) -> None:
    """Make transformers save a model from a GGUF file, which it calls quantized even after it has unpacked the weights."""
    quantization = getattr(model.config, "quantization_config", None)
    if getattr(quantization, "quant_method", None) == "gguf":
        del model.config.quantization_config
        vars(model).update(hf_quantizer=None, is_quantized=False)


def compiled_calls(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules that ``torch.compile`` compiled, and the attribute that holds what it made."""
    for module in model.modules():
        if "_orig_mod" in module._modules:
            yield module, "forward"
        elif module._compiled_call_impl is not None:
            yield module, "_compiled_call_impl"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 divides weights over processes, which must then run the model equally often.

    Weights that are gathered at the moment count. The backward must run equally often too.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def sharding_group(model: nn.Module) -> distributed.ProcessGroup | None:
    """The processes that the next forwards gather weights from; None where this one has all of them."""
    for weight in model.parameters():
        if isinstance(weight, DTensor):
            for dimension, placement in enumerate(weight.placements):
                if placement.is_shard():
                    return weight.device_mesh.get_group(dimension)
    return None


def check_whole(name: str, model: nn.Module) -> None:
    """Raises ValueError if weights are sharded, for what would run the model another number of times in each process."""
    if sharding_group(model) is not None:
        raise ValueError(f"{name}: weights are sharded: in quietstar.run.sharding.gathered(qs) each process has all of them")


def largest(group: distributed.ProcessGroup | None, value: int, device: torch.device) -> int:
    """The largest value in any process of a group; of None, the one here. Waits for the device."""
    if group is None:
        return value
    found = torch.full((), value, dtype=torch.int64, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
    return int(found)


@contextmanager
def layer_checkpoints_off(model: nn.Module) -> Iterator[None]:
    """Turn gradient checkpointing of single layers off inside the context, for code that is recomputed as a whole."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the context; afterwards every submodule is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def initial_embedding(embed: nn.Embedding, init: int | str | None, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The vector, fp32 [D], that start and end begin with: of a token id, of text, of "---", or the mean embedding."""
    if init is None and tokenizer is not None:
        init = "---"
    ids: Sequence[int]
    if isinstance(init, str):
        if tokenizer is None:
            raise ValueError(f"embedding_init: text {init!r} needs a tokenizer; pass one, or a token id")
        ids = tokenizer(init, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"embedding_init: the tokenizer gives no tokens for {init!r}")
    elif init is not None:
        if not 0 <= init < len(embed.weight):
            raise ValueError(f"embedding_init must be from 0 to V-1={len(embed.weight) - 1}, got {init}")
        ids = [init]
    else:
        ids = range(len(embed.weight))
    chunks = torch.as_tensor(list(ids), device=embed.weight.device).split(4096)
    return torch.stack([embed(chunk).float().sum(0) for chunk in chunks]).sum(0) / len(ids)


def not_finite(model: nn.Module, where: str) -> ValueError:
    """An error that names the place and the likely cause."""
    dtype = next(model.parameters()).dtype
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    overflow = "" if broken_weight(model) else f", so it overflows in {str(dtype).removeprefix('torch.')}"
    return ValueError(f"the model's logits are not finite {where}: its {state(model)}{overflow}")


def state(model: nn.Module) -> str:
    """In words that begin with "weight", whether all of them are finite."""
    name = broken_weight(model)
    return f"weight {name} holds NaN or infinity" if name else "weights are finite"


def broken_weight(model: nn.Module) -> str | None:
    """The first weight that holds NaN or infinity; of sharded weights only this process's part is read."""
    for name, weight in model.named_parameters():
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        if part.is_floating_point() and not part.is_meta and not bool(part.isfinite().all()):
            return name
    return None
