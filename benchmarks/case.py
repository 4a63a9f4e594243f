"""One point of a benchmark: what is computed, on which inputs, how much work that is, and how a result is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Inputs = dict[str, Any]

# Largest ‖result - truth‖ / ‖truth‖. Rounding of fp32 stays far below, tf32 does not.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Wrong(Exception):
    """A candidate's result is not that of the op."""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes through main memory: the useful ones of a case, or those that a peer needs for it."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A case of one op; subclasses add its sizes, by their letters of the dimension key.

    Attributes:
        op: the op's name.
        rotates: several sets of inputs take turns, to overflow the cache; a whole model's weights do that alone.
        grid: what the case is one point of: "headline", or the name of the size that varies.
        what: "forward" or "forward+backward", where the op has both.
    """

    op: ClassVar[str]
    rotates: ClassVar[bool] = True
    grid: str = "headline"
    what: str = "forward"
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes by letter."""

    @abstractmethod
    def work(self) -> Work:
        """The useful work: what the layout makes visible, each input read once and each output written once."""

    @abstractmethod
    def inputs(self, seed: int) -> Inputs:
        """Random inputs on the device; other seeds, other inputs."""

    @abstractmethod
    def call(self, function: Callable[..., Any], inputs: Inputs) -> Any:
        """Run a candidate once, with its backward where ``what`` says so."""

    @abstractmethod
    def check(self, function: Callable[..., Any]) -> None:
        """Raises Wrong where a candidate computes something else."""

    def to_compile(self) -> Case:
        """A case as small as may be of which a call compiles what one of this case does."""
        return self

    def randn(self, seed: int, *shape: int, deviation: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).mul_(deviation).to(self.dtype)

    def __str__(self) -> str:
        sizes = " ".join(f"{letter} {size}" for letter, size in self.sizes.items())
        return f"{self.op} {self.what}, {sizes}, {str(self.dtype).removeprefix('torch.')}"


def judge(what: str, got: Tensor, truth: Tensor, bound: float) -> None:
    """Raises Wrong where ‖got - truth‖ > bound·‖truth‖, or where got holds a NaN."""
    if got.shape != truth.shape:
        raise Wrong(f"{what} has shape {list(got.shape)}, not {list(truth.shape)}")
    got, truth = got.detach(), truth.detach()
    error = float((got.to(truth.dtype) - truth).norm() / truth.norm())
    if not error <= bound:
        raise Wrong(f"{what} differs by {error:.1e}, relative in norm")
