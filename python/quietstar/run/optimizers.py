"""The optimizers that a run may use, by name, and an optimizer's state as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

OPTIMIZERS = ("adamw", "fused", "8bit")


def make_optimizer(name: str, weights: Sequence[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over ``weights``.

    Args:
        name: adamw is torch's own; fused is the same in one kernel for all weights; 8bit keeps the moments of weights of 4,096
            values and more in 8 bits, in blocks (bitsandbytes, arXiv 2110.02861).

    Raises:
        ValueError: torch has no fused one for the weights' device or dtype, or bitsandbytes isn't there or can't work here.
    """
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "8bit":
        return _eight_bit(weights, options)
    if name == "fused":
        for device, dtype in {(weight.device, weight.dtype) for weight in weights}:
            _try_fused(device, dtype)
        options["fused"] = True
    return torch.optim.AdamW(weights, **options)


def _try_fused(device: torch.device, dtype: torch.dtype) -> None:
    """Torch itself says at the first step where it has no such kernel."""
    weight = torch.zeros(1, device=device, dtype=dtype)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"optimizer 'fused' does not work with {dtype} on {device}: {str(error).splitlines()[0]}") from error


def _eight_bit(weights: Sequence[Tensor], options: dict[str, Any]) -> torch.optim.Optimizer:
    if any(isinstance(weight, DTensor) for weight in weights):
        raise ValueError("optimizer must be 'adamw' or 'fused' where weights are sharded over processes, got '8bit'")
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # what a library of another device raises is not only ImportError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"optimizer '8bit' needs bitsandbytes, which does not load here: {reason}") from error
    return AdamW8bit(weights, **options)


def to_tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The "state" of a ``state_dict`` by names such as "0.exp_avg", as safetensors can hold it: whole numbers are int64 [],
    and what several weights share is there for each.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in _leaves(state):
        tensor = value if isinstance(value, Tensor) else torch.tensor(int(value), dtype=torch.int64)
        tensors[name] = tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(value))
    return tensors


def _leaves(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, Any]:
    """What ``to_tensors`` made of it."""
    state: dict[Any, Any] = {}
    for key, value in tensors.items():
        index, *path, name = key.split(".")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[name] = int(value) if value.dtype == torch.int64 and value.ndim == 0 else value
    return state
