"""One point of a benchmark: what is computed, on which inputs, how much work that is, and how a result is checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Inputs = dict[str, Any]

# Largest ‖result - truth‖ / ‖truth‖. Rounding in fp32 stays far below its bound; tf32 does not.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Wrong(Exception):
    """A candidate's result is not what the op computes."""


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes to and from main memory: the useful ones of a case, or those that a baseline needs for it."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A case of one op. Subclasses add its sizes, named by the letters of the dimension key.

    Attributes:
        op: the op's name.
        size_names: the attributes that are the case's sizes, in the order in which tables show them.
        rotates: whether several sets of inputs take turns, so that they don't stay in the cache. Not needed for a whole
            model, whose weights overflow it.
        grid: the series that the case belongs to: "headline", or the name of the size that varies.
        what: "forward" or "forward+backward", where the op has both.
    """

    op: ClassVar[str]
    size_names: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[bool] = True
    grid: str = "headline"
    what: str = "forward"
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.size_names}

    @abstractmethod
    def work(self) -> Work:
        """The useful work: what the layout makes visible, with each input read once and each output written once."""

    @abstractmethod
    def inputs(self, seed: int) -> Inputs:
        """Random inputs on the device."""

    @abstractmethod
    def call(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Run a candidate once, including its backward if ``what`` says so."""

    def check(self, function: Callable[..., Any]) -> None:
        """Raises Wrong if a candidate computes something else."""
        raise NotImplementedError(f"the benchmark {self.op} compares its candidates with each other")

    def to_compile(self) -> Case:
        """The smallest case that compiles the same kernels as this one."""
        return self

    def randn(self, seed: int, *shape: int, deviation: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).mul_(deviation).to(self.dtype)

    def __str__(self) -> str:
        sizes = " ".join(f"{name} {size}" for name, size in self.sizes.items())
        return ", ".join(filter(None, [f"{self.op} {self.what}", sizes, str(self.dtype).removeprefix("torch.")]))


def judge(what: str, got: Tensor, truth: Tensor, bound: float) -> None:
    """Raises Wrong if ‖got - truth‖ > bound·‖truth‖, or if got holds a NaN."""
    if got.shape != truth.shape:
        raise Wrong(f"{what} has shape {list(got.shape)}, not {list(truth.shape)}")
    got, truth = got.detach(), truth.detach()
    error = float((got.to(truth.dtype) - truth).norm() / truth.norm())
    if not error <= bound:
        raise Wrong(f"{what} differs by {error:.1e}, relative in norm")
