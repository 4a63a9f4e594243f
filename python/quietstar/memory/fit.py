"""Whether a training step fits in free memory, and which settings of the same step would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quietstar.memory.step import StepMemory, human


@dataclass(frozen=True)
class Machine:
    """Where a step runs, with ``free`` bytes: those of each GPU, or of all processes together."""

    device: torch.device
    free: int
    processes: int

    def needs(self, memory: StepMemory, checkpointing: bool) -> int:
        """Bytes that must be free, where the libraries are loaded already."""
        if self.device.type == "cpu":
            return self.processes * memory.peak_on_cpu(0, checkpointing)
        return memory.peak(checkpointing)


@dataclass(frozen=True)
class Plan:
    """What a step's memory depends on and its results don't.

    Attributes:
        texts: texts at a time, in each process.
        checkpointing: activations are recomputed in the backward pass.
        anchor_chunk: anchors of each text at a time; None: all.
    """

    texts: int
    checkpointing: bool
    anchor_chunk: int | None


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest that fits of ``most`` and the powers of two below it; 0 if none does."""
    if fits(most):
        return most
    size = 1
    while size < most and fits(size):
        size *= 2
    return size // 2


def _that_fits(plan: Plan, length: int, fits: Callable[[Plan], bool]) -> Plan | None:
    """The fastest plan that fits, and of as fast ones the largest, for texts of ``length`` tokens."""
    for checkpointing in sorted({plan.checkpointing, True}):

        def fit(texts: int, checkpointing: bool = checkpointing) -> bool:
            return fits(replace(plan, texts=texts, checkpointing=checkpointing))

        if texts := _largest(plan.texts, fit):
            return replace(plan, texts=texts, checkpointing=checkpointing)
    chunk = _largest(plan.anchor_chunk or length, lambda chunk: fits(Plan(1, True, chunk)))
    return Plan(1, True, chunk) if chunk else None


def too_large(plan: Plan, length: int, memory: Callable[[int, int | None], StepMemory], machine: Machine, texts: int) -> str:
    """Why a step doesn't fit, and the options with which it would; empty if it fits.

    Args:
        memory: that of so many texts at a time, and anchors of each.
        texts: of a step in each process.
    """

    def needs(plan: Plan) -> int:
        return machine.needs(memory(plan.texts, plan.anchor_chunk), plan.checkpointing)

    if (needed := needs(plan)) <= machine.free:
        return ""
    text = f"a step needs about {human(needed)} and {human(machine.free)} are free: "
    fits = _that_fits(plan, length, lambda plan: needs(plan) <= machine.free)
    if fits is None:
        return f"{text}shorter texts (--length) or thoughts, a smaller model or --lora-rank need less"
    options = [f"--accumulation={-(-texts // fits.texts)}"] * (fits.texts != plan.texts)
    options += ["--gradient-checkpointing"] * (fits.checkpointing != plan.checkpointing)
    options += [f"--anchor-chunk={fits.anchor_chunk}"] * (fits.anchor_chunk != plan.anchor_chunk)
    return f"{text}{human(needs(fits))} are enough with {' '.join(options)}"
