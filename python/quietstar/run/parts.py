"""What a step decides before its losses: where to think, how long thoughts are, and what the losses are divided by."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad

from quietstar.model import QuietStar
from quietstar.objective import Counts
from quietstar.run import figures
from quietstar.run.batches import COLUMNS, Batch


def decide(accelerator: Accelerator, qs: QuietStar, parts: list[Batch], seed: int) -> tuple[list[Batch], Counts]:
    """This process's parts of a step, with the anchors and thought lengths that the config asks for; and the counts of all
    processes. ``qs`` must be in training mode."""
    with accelerator.autocast():
        if qs.thought_config.anchors != "all":
            parts = _same_width(accelerator, [part | {"anchors": _choose_anchors(qs, part, seed)} for part in parts])
        if qs.thought_config.stop_threshold is not None:  # only sampling shows how many tokens there are to count
            parts = [part if "thought_ids" in part else part | _think(qs, part, seed) for part in parts]
    return parts, figures.total_counts(accelerator, [_count(qs, part) for part in parts])


def same_length(accelerator: Accelerator, parts: list[Batch]) -> list[Batch]:
    """Pads the texts on the right to the longest of all parts and processes, so that the number of parts changes nothing."""
    length = torch.tensor(max(part["input_ids"].shape[1] for part in parts), device=accelerator.device)
    longest = int(accelerator.gather(length).max())
    fills = {name: fill for name, (dimensions, fill) in COLUMNS.items() if dimensions == "L"}
    return [
        part | {name: pad(part[name], (0, longest - part[name].shape[1]), value=fills[name]) for name in fills.keys() & part}
        for part in parts
    ]


def _choose_anchors(qs: QuietStar, part: Batch, seed: int) -> Tensor:
    return qs.choose_anchors(part["input_ids"], part["attention_mask"], part.get("document_ids"), part["sequence_ids"], seed)


def _same_width(accelerator: Accelerator, parts: list[Batch]) -> list[Batch]:
    """Pads the anchors to the same number in each part of each process, so that all compute the same number of chunks."""
    width = torch.tensor(max(part["anchors"].shape[1] for part in parts), device=accelerator.device)
    most = int(accelerator.gather(width).max())
    return [part | {"anchors": pad(part["anchors"], (0, most - part["anchors"].shape[1]), value=-1)} for part in parts]


def _think(qs: QuietStar, part: Batch, seed: int) -> Batch:
    names = ("input_ids", "attention_mask", "anchors", "document_ids", "sequence_ids")
    inputs: dict[str, Any] = {name: part[name] for name in names if name in part}
    thoughts = qs.think(**inputs, seed=seed)
    assert thoughts.thought_lengths is not None
    return {"thought_ids": thoughts.thought_ids, "thought_lengths": thoughts.thought_lengths}


def _count(qs: QuietStar, part: Batch) -> Counts:
    names = ("input_ids", "attention_mask", "labels", "anchors", "document_ids", "thought_lengths")
    return qs.count_targets(**{name: part[name] for name in names if name in part})
