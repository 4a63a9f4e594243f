"""Products of one input as one product, over copies of their weights that stand side by side for the steps of a rollout.

The weights stay the model's: copies are made whenever a text is read, and last as long as what is kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from quietstar.hf.modules import compiled_calls

# By the first layer of a group: the weights of all [sum of widths,D], and their biases if they have any.
Merged = dict[nn.Linear, tuple[Tensor, Tensor | None]]
# Bytes of all copies. Products of larger models take so long that launches don't show beside them.
MOST = 2**30


def untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's ``forward`` and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module) and module._compiled_call_impl is None


def plain(module: nn.Module) -> bool:
    """Whether the module only multiplies by a weight that is all there: not adapted, quantized, sharded or hooked."""
    return type(module) is nn.Linear and untouched(module) and not isinstance(module.weight, DTensor)


def products(x: Tensor, merged: Merged | None, *layers: nn.Linear) -> list[Tensor]:
    """What each layer makes of x [...,D]; where their weights were merged, one tensor that holds all side by side."""
    found = None if merged is None else merged.get(layers[0])
    return [layer(x) for layer in layers] if found is None else [F.linear(x, *found)]


def groups_of(model: nn.Module) -> Iterator[tuple[nn.Linear, ...]]:
    """The groups of all layers that have such; none where ``torch.compile`` fuses by itself."""
    if torch.compiler.is_compiling() or next(compiled_calls(model), None):
        return
    for module in model.modules():
        groups: Any = getattr(module, "merged_groups", None)
        if groups is not None:
            yield from groups()


@torch.no_grad()
def merge(groups: Iterable[tuple[nn.Linear, ...]], merged: Merged | None) -> Merged | None:
    """The weights of the groups as they are now, in the memory of an earlier call if there was one: graphs read it there.

    A group is left out if a layer is more than a product. None for large models, and where autocast casts weights.
    """
    kept = [group for group in groups if all(map(plain, group)) and len({_kind(layer) for layer in group}) == 1]
    size = sum(layer.weight.nbytes for group in kept for layer in group)
    if not kept or size > MOST or torch.is_autocast_enabled(kept[0][0].weight.device.type):
        return None
    if merged is None or list(merged) != [group[0] for group in kept]:
        merged = {group[0]: (_room([x.weight for x in group]), _biases(group, _room)) for group in kept}
    for group in kept:
        weight, bias = merged[group[0]]
        torch.cat([layer.weight for layer in group], out=weight)
        _biases(group, partial(torch.cat, out=bias))
    return merged


def _kind(layer: nn.Linear) -> tuple:
    return layer.weight.dtype, layer.weight.device, layer.bias is None


def _room(parts: list[Tensor]) -> Tensor:
    return parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])


def _biases(group: tuple[nn.Linear, ...], put: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    return None if group[0].bias is None else put([layer.bias for layer in group])
