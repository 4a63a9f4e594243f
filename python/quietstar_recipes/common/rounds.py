"""What STaR and V-STaR do alike: the start on the data's own chains, and a round's problems, batch after batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from quietstar.run.metrics import Pace
from quietstar_recipes.common.log import log_figures
from quietstar_recipes.tasks import Row, Task


def rows_with_chains(task: Task, count: int, generator: torch.Generator, recipe: str) -> list[Row]:
    """Training problems for the supervised start. Raises ValueError if none has a chain."""
    rows = task.sample_with_chain(count, generator)
    if not rows:
        raise ValueError(f"{recipe}: sft_steps needs problems with chains, but the data have none")
    return rows


def batches_of_round(
    rows: Sequence[Row], config: Any, number: int, kept: Callable[[], int]
) -> Iterator[tuple[int, Sequence[Row]]]:
    """The place of each batch's first row, and the batch; now and then the log says how many rows were tried and kept."""
    pace = Pace()
    for start in range(0, len(rows), config.batch_size):
        if pace.due():
            log_figures(config.out, {"round": number, "tried": start, "kept": kept()})
        yield start, rows[start : start + config.batch_size]
