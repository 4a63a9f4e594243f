"""What the processes of a run must agree on, and what happens when one of them is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from torch import distributed

from quietstar.config import TrainConfig

__all__ = ["process_state"]


def process_state() -> PartialState:
    """Which of the processes this is. Without accelerators, Accelerate must be asked to use the CPU for them to connect."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=several and not torch.accelerator.is_available())


def check_processes(processes: int, config: TrainConfig, strategy: str) -> None:
    """Raises ValueError if this number of processes can't run ``config`` with a sharding ``strategy``."""
    if processes > config.batch_size:
        raise ValueError(f"train: batch_size must be at least the number of processes, {processes}, got {config.batch_size}")
    if strategy != "no" and not distributed.is_initialized():
        raise ValueError(f"train: sharding must be 'no' unless torchrun or accelerate launch started the run, got {strategy!r}")
    if strategy != "no" and config.anchor_chunk == "auto":
        raise ValueError("train: anchor_chunk must be a number if weights are sharded, the same in each process, got 'auto'")


def check_same_step(accelerator: Accelerator, done: int, config: TrainConfig) -> None:
    """Raises ValueError if the processes resume from different steps."""
    steps = accelerator.gather(torch.tensor([done], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(f"train: all processes must see the same out={config.out}, but found checkpoints of steps {steps}")


def in_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([flag], device=accelerator.device)).any())


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns the errors of collectives whose partner has ended into ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError("train: another process ended, so this one can't continue") from error
