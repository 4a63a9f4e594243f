"""The optimizers of a run, by name, and an optimizer's state as plain tensors and in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from quietstar.checkpoints.contents import read_file
from quietstar.checkpoints.places import RUN
from quietstar.files.reading import read_json, reason_of
from quietstar.run.resume import RunFile

OPTIMIZER = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of PyTorch's AdamW


def make_optimizer(name: str, weights: Sequence[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over ``weights``.

    Args:
        name: one of ``quietstar.config.OPTIMIZERS``. adamw is PyTorch's. fused is the same in one kernel for all weights. 8bit
            stores the moments of weights with at least 4,096 values in 8 bits, in blocks (bitsandbytes, arXiv 2110.02861).
    """
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "8bit":
        return _eight_bit(weights)(weights, **options)
    if name == "fused":
        for device, dtype in {(weight.device, weight.dtype) for weight in weights}:
            _try_fused(device, dtype)
        options["fused"] = True
    return torch.optim.AdamW(weights, **options)


def _try_fused(device: torch.device, dtype: torch.dtype) -> None:
    """PyTorch itself raises only at the first step."""
    weight = torch.zeros(1, device=device, dtype=dtype)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"optimizer 'fused' does not work with {dtype} on {device}: {reason_of(error)}") from error


def _eight_bit(weights: Sequence[Tensor]) -> Any:
    """The class of bitsandbytes. Raises ValueError where it can't be used."""
    if any(isinstance(weight, DTensor) for weight in weights):
        raise ValueError("optimizer must be 'adamw' or 'fused' where weights are sharded over processes, got '8bit'")
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # a library built for another device may raise more than ImportError
        reason = reason_of(error)
        raise ValueError(f"optimizer '8bit' needs bitsandbytes, which does not load here: {reason}") from error
    return AdamW8bit


def clear_gradients(model: nn.Module, where: Tensor) -> None:
    """Make all gradients 0 if ``where``, bool [] on their device, is True."""
    for weight in model.parameters():
        if weight.grad is not None:
            grad = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
            grad.masked_fill_(where, 0)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state. Its weights may be sharded. Raises ValueError if it belongs to other weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    groups = read_json(path / RUN, RunFile).optimizer
    if not fits(groups, optimizer.state_dict()["param_groups"]):
        raise ValueError(f"{path}: {RUN} has the settings of another optimizer")
    tensors = read_file(path, OPTIMIZER)
    check_tensors(f"{path}: {OPTIMIZER}", tensors, weights)
    sharded = {key: _shard_like(value, weights[int(key.partition(".")[0])]) for key, value in tensors.items()}
    optimizer.load_state_dict({"state": from_tensors(sharded), "param_groups": groups})


def to_tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The "state" of a ``state_dict`` as tensors for safetensors, by names such as "0.exp_avg".

    Numbers become int64 tensors of shape []; a tensor that several weights share is stored for each.
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


def fits(saved: Any, own: Any) -> bool:
    """Whether JSON values are such as an optimizer's own settings: the same names and lengths, finite numbers for numbers."""
    if isinstance(own, dict):
        return isinstance(saved, dict) and saved.keys() == own.keys() and all(fits(saved[name], own[name]) for name in own)
    if isinstance(own, list | tuple):
        return isinstance(saved, list) and len(saved) == len(own) and all(map(fits, saved, own))
    if own is None or isinstance(own, bool):
        return saved is None or isinstance(saved, bool)
    number = type(saved) in (int, float) and math.isfinite(saved)
    return number if isinstance(own, int | float) else type(saved) is type(own)


def check_tensors(where: str, tensors: Mapping[str, Tensor], weights: Sequence[Tensor]) -> None:
    """Raises ValueError, which begins with ``where``, for the state of other weights. Blocks of 8 bits may be any."""
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not (index.isdecimal() and index.isascii() and int(index) < len(weights) and name):
            raise ValueError(f"{where} has {key!r}, and there are {len(weights)} weights")
        if name in MOMENTS:
            shape, want = list(value.shape), list(weights[int(index)].shape)
            if shape != want or not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"{where}: {key} must be finite floats of shape {want}, got {value.dtype} {shape}")
            missing = [other for other in ("step", *MOMENTS) if f"{index}.{other}" not in tensors]
            if missing:
                raise ValueError(f"{where} lacks {index}.{missing[0]}")


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, Any]:
    """The inverse of ``to_tensors``."""
    state: dict[Any, Any] = {}
    for key, value in tensors.items():
        index, *path, name = key.split(".")
        level = state.setdefault(int(index), {})
        for part in path:
            level = level.setdefault(part, {})
        level[name] = int(value) if value.dtype == torch.int64 and value.ndim == 0 else value
    return state


def _shard_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Shard a whole tensor like ``weight``. Every process has the tensor, so nothing is sent."""
    if not isinstance(weight, DTensor) or tensor.shape != weight.shape:
        return tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)
