"""What the processes of a run must agree on, what happens when one is lost, and stopping in an orderly way after a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import distributed

from quietstar.config import TrainConfig
from quietstar.run import signals


def process_state() -> PartialState:
    """Which of the processes this is. Without accelerators, Accelerate must be asked to use the CPU for them to connect."""
    size, *_ = map(_from_environment, ("WORLD_SIZE", "RANK", "LOCAL_RANK"))  # Accelerate reads all three
    return PartialState(cpu=size > 1 and not torch.accelerator.is_available())


def _from_environment(name: str) -> int:
    """A whole number, 1 where the variable isn't set."""
    value = os.environ.get(name, "1")
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a whole number in the environment, got {value!r}") from error


def find_strategy(config: TrainConfig) -> str:
    """The strategy of ``config.sharding``, else of the FSDP section in Accelerate's configuration (environment variables)."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return config.sharding
    version = _from_environment("FSDP_VERSION")
    if version != 2:
        raise ValueError(f"train: fsdp_version must be 2 in Accelerate's configuration, got {version}")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise ValueError("train: fsdp_cpu_ram_efficient_loading must be false in Accelerate's configuration, got true")
    if config.sharding != "no":
        return config.sharding
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    return "shard_grad_op" if again == "false" else "full_shard"


def check_processes(processes: int, config: TrainConfig, strategy: str) -> None:
    """Raises ValueError if this number of processes can't run ``config`` with a sharding ``strategy``."""
    if processes > config.batch_size:
        raise ValueError(f"train: batch_size must be at least the number of processes, {processes}, got {config.batch_size}")
    if strategy != "no" and not distributed.is_initialized():
        raise ValueError(f"train: sharding must be 'no' unless torchrun or accelerate launch started the run, got {strategy!r}")
    if strategy != "no" and config.anchor_chunk == "auto":
        raise ValueError("train: anchor_chunk must be a number if weights are sharded, the same in each process, got 'auto'")
    if strategy != "full_shard" and config.rollout_weights == "gathered":
        raise ValueError(f"train: rollout_weights='gathered' needs sharding full_shard, got {strategy!r}")


def in_each_process(accelerator: Accelerator, value: int) -> list[int]:
    """A number of each process."""
    if accelerator.num_processes == 1:
        return [value]
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turns the errors of collectives whose partner has ended into ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError("train: another process ended, so this one can't continue") from error


STOPS = "{name}: stopping after this step, and saving"
ASKS = "finishing this step; press Ctrl-C again to quit now and lose the steps since the last save"


class Interrupted(Exception):
    """A signal stopped the run after its last step was saved in ``checkpoint``; None before the first step."""

    def __init__(self, step: int, checkpoint: Path | None):
        super().__init__(f"stopped by a signal after step {step}" + (f"; resume from {checkpoint}" if checkpoint else ""))
        self.checkpoint = checkpoint


class Abandoned(Exception):
    """A signal came during an evaluation, which is left unfinished."""


_watches: list[Callable[[int, int], None]] = []


@contextmanager
def watching(watch: Callable[[int, int], None]) -> Iterator[None]:
    """In this context evaluations call ``watch``, with the batches that are done and all of them, before each batch."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)


def before_batch(done: int, total: int) -> None:
    for watch in _watches:
        watch(done, total)


class Signals:
    """Remembers the signals that ask a run to stop until the step is done, and says so on stderr.

    A second Ctrl-C says what a third one would lose, which raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.caught = bool(signals.came)  # one that a library took for its own
        self._presses = 0
        self._speaks = process_state().is_main_process  # Ctrl-C goes to all processes of a run
        self._answered = signals.answered(self._catch)

    def __enter__(self) -> Signals:
        self._answered.__enter__()
        return self

    def _catch(self, number: int) -> None:
        self.caught = True
        self._presses += number == signal.SIGINT
        if self._presses > 2:
            raise KeyboardInterrupt
        again = self._presses == 2 and number == signal.SIGINT
        if self._speaks:
            signals.say(ASKS if again else STOPS.format(name=signals.name_of(number)))

    def __exit__(self, *error: Any) -> None:
        self._answered.__exit__(*error)
