"""What to say of a model whose logits are not finite."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


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
