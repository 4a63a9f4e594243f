"""Published checkpoints: their names for the thought parts, and nothing loaded by halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quietstar.model import QuietStar

# Published name to the wrapper's; every other name belongs to the base model.
_HEAD = {f"talk_head.0.{name}": f"mixing_head.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")}
_EMBEDDINGS = ("start_embedding", "end_embedding")


def load_state_dict(qs: QuietStar, state: Mapping[str, Tensor], embedding_scale: float) -> None:
    """See ``QuietStar.load_official_state_dict``."""
    parameters = {name: tensor for name, tensor in qs.named_parameters() if not name.startswith("model.")}
    base = qs.model.state_dict()
    targets = {published: parameters[ours] for published, ours in _HEAD.items()}
    targets |= {name: tensor for name, tensor in base.items()}
    source = {name: tensor for name, tensor in state.items() if name not in _EMBEDDINGS}
    for name in _EMBEDDINGS:
        if name in state:
            if state[name].ndim != 2 or state[name].shape[1] != parameters[name].shape[0]:
                shape = [2, parameters[name].shape[0]]
                raise ValueError(f"official checkpoint: {name} must have shape [2,D]={shape}, got {list(state[name].shape)}")
            source[name] = state[name][0] * (embedding_scale / qs.thought_config.embedding_scale)
        targets[name] = parameters[name]

    tied = {name for name in getattr(qs.model, "all_tied_weights_keys", {}) or {}}
    missing = sorted(set(targets) - set(source) - tied)
    unknown = sorted(set(source) - set(targets))
    if missing or unknown:
        parts = [f"{word} {', '.join(names[:5])}" for word, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(f"official checkpoint does not fit {type(qs.model).__name__}: {'; '.join(parts)}")
    for name, tensor in source.items():
        if tensor.shape != targets[name].shape:
            want, got = list(targets[name].shape), list(tensor.shape)
            raise ValueError(f"official checkpoint: {name} must have shape {want}, got {got}")
    with torch.no_grad():
        for name, tensor in source.items():
            targets[name].copy_(tensor)
