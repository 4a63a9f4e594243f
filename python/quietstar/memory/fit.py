"""Whether a training step fits in free memory, and which settings of the same step would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    def smaller(self, length: int) -> Iterator[Plan]:
        """This plan, and those that take less memory for texts of ``length`` tokens and more time, the fastest first."""
        for checkpointing in sorted({self.checkpointing, True}):
            for texts in _halves(self.texts):
                yield replace(self, texts=texts, checkpointing=checkpointing)
        for chunk in _halves((self.anchor_chunk or length) // 2):
            yield Plan(1, True, chunk)


def _halves(size: int) -> Iterator[int]:
    while size:
        yield size
        size //= 2


def too_large(
    plan: Plan, length: int, memory: Callable[[int, int | None], StepMemory], machine: Machine, option: Callable[[int], str]
) -> str:
    """Why a step doesn't fit, and the options with which it would; empty if it fits.

    Args:
        memory: that of so many texts at a time, and anchors of each.
        option: the command's option for so many texts at a time.
    """

    def needs(plan: Plan) -> int:
        return machine.needs(memory(plan.texts, plan.anchor_chunk), plan.checkpointing)

    if (needed := needs(plan)) <= machine.free:
        return ""
    text = f"a step needs about {human(needed)} and {human(machine.free)} are free: "
    if needs(Plan(1, True, 1)) > machine.free:
        return f"{text}shorter texts (--length) or thoughts, a smaller model or --lora-rank need less"
    fits = next(x for x in plan.smaller(length) if needs(x) <= machine.free)
    options = [option(fits.texts)] * (fits.texts != plan.texts)
    options += ["--gradient-checkpointing"] * (fits.checkpointing != plan.checkpointing)
    options += [f"--anchor-chunk={fits.anchor_chunk}"] * (fits.anchor_chunk != plan.anchor_chunk)
    return f"{text}{human(needs(fits))} are enough with {' '.join(options)}"
