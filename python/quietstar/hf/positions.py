"""How many positions a model takes: learned ones end, and some rotary ones change for all rows with the longest position."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import on_host, refuse_where

_CHANGE = "positions before {} rotary embeddings change"


def check_layout(model: str, limits: dict[str, int], layout: ThoughtLayout) -> None:
    """Raises ValueError where a text's thoughts pass one of the limits of ``model``."""
    if not limits or layout.L + layout.S <= (limit := min(limits.values())):
        return
    positions = layout.position_ids()
    if on_host(positions):
        check_room(model, limits, int(positions.max()) + 1)
    else:
        refuse_where(positions >= limit, f"input_ids: text and thoughts need more than {limit} positions")


def check_room(model: str, limits: dict[str, int], needed: int, what: str = "input_ids: text and thoughts") -> None:
    """``limits`` as ``position_limits`` returns them; ``what`` needs ``needed`` positions and begins the message."""
    for kind, limit in limits.items():
        if needed > limit:
            raise ValueError(f"{what} need {needed} positions and {model} has {limit} {kind}: make them shorter")


def position_limits(model: PreTrainedModel) -> dict[str, int]:
    return learned_positions(model) | rotary_limits(model.config)


def learned_positions(model: PreTrainedModel) -> dict[str, int]:
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("wpe" in name or "position" in name)
    ]
    return {"learned positions": min(model.config.get_text_config().max_position_embeddings, *tables)} if tables else {}


def rotary_limits(config: PretrainedConfig) -> dict[str, int]:
    """Positions up to which the rotary embeddings of every layer type are the same, whatever the longest position is."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = {}
    for parameters in (rope, *rope.values()):  # of all layers, or of each layer type
        kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
        if kind == "longrope":
            limits[_CHANGE.format(kind)] = parameters["original_max_position_embeddings"]
        elif "dynamic" in kind:
            # At the last position, transformers keeps what a longer call left.
            limits[_CHANGE.format(kind)] = config.max_position_embeddings - 1
    return limits
