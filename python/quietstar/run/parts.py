"""The parts of a step before their losses: checked, laid out, on the device, with anchors and counts."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial, reduce
from operator import add

from accelerate import Accelerator
from torch.nn.functional import pad

from quietstar.model import QuietStar
from quietstar.objective import Counts
from quietstar.run.batches import Batch, moved
from quietstar.run.processes import in_each_process
from quietstar.run.sharding import gathered
from quietstar.texts import COLUMNS, Texts


def prepare_parts(
    accelerator: Accelerator, qs: QuietStar, parts: list[Batch], seed: int, gather: bool = False
) -> tuple[list[Texts], Counts]:
    """Checks the parts of a step, chooses anchors, samples thoughts whose lengths are not known, and counts targets.

    Parts on the CPU are checked and laid out there. A GPU is waited for only to choose anchors by entropy or a gate, to agree
    on their number between processes, and to sample thoughts that end themselves.

    Args:
        qs: in training mode.
        parts: this process's, as ``batches.collate`` makes them.
        gather: sample all thoughts here, with whole weights.

    Returns:
        This process's parts on its device, and the counts of all parts and processes.
    """
    with accelerator.autocast():
        texts = [qs.texts(**part, chooses=False) for part in parts]
        if qs.thought_config.anchors != "all":
            # Chosen by a method of the model, which FSDP gathers for it; as many in each part of each process, so that all
            # compute as many chunks.
            texts = [
                part if part.anchors is not None else part.with_anchors(qs.choose_anchors(part, seed=seed)) for part in texts
            ]
            most = max(in_each_process(accelerator, max(part.layout.P for part in texts)))
            texts = [part.with_unused_anchors(most) for part in texts]
        stops = qs.thought_config.stops
        if not stops:
            texts = [qs.with_tables(part) for part in texts]
        texts = [part.map(partial(moved, device=accelerator.device)) for part in texts]
        if stops or gather:  # if they stop, only sampling shows how many tokens there are to count
            with gathered(qs) if gather else nullcontext():
                for i, part in enumerate(texts):
                    if part.thought_ids is None:
                        thoughts = qs.think(part, seed=seed)
                        texts[i] = part.with_thoughts(qs.thought_config, thoughts.thought_ids, thoughts.thought_lengths)
            texts = [qs.with_tables(part) for part in texts]
    total = reduce(add, (part.tables.counts for part in texts if part.tables is not None))
    return texts, Counts(accelerator.reduce(total.values))


def same_length(accelerator: Accelerator, parts: list[Batch], least: int) -> list[Batch]:
    """Pads the texts on the right to the longest of all parts and processes, so that the number of parts changes nothing.

    Args:
        least: tokens to pad to at any rate, since a model refuses fewer.
    """
    longest = max(least, *in_each_process(accelerator, max(part["input_ids"].shape[1] for part in parts)))
    fills = {name: column.padding for name, column in COLUMNS.items() if column.letters == "B,L"}
    return [
        part | {name: pad(part[name], (0, longest - part[name].shape[1]), value=fills[name]) for name in fills.keys() & part}
        for part in parts
    ]
