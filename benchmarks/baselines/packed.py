"""What the cases of both attention ops share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.harness.case import Case
from quietstar_kernels import ThoughtLayout

# Of packed tensors. In training q [B,H,M,K] and k, v [B,G,M,K] hold all packed rows. In decoding q [B,H,L*N,K] holds one row of
# every thought, and k, v [B,G,M,K] the text's rows and all rows of the thoughts, including those not written yet.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PackedCase(Case):
    """Every position of B texts of L tokens thinks N thoughts of S rows."""

    size_names = tuple("BLNSHGK")
    B: int = 1
    L: int
    N: int = 2
    S: int = 14
    H: int = 8
    G: int = 2
    K: int = 128

    @property
    def M(self) -> int:
        return self.L + self.L * self.N * self.S

    @property
    def layout(self) -> ThoughtLayout:
        return ThoughtLayout.every_position(self.B, self.L, self.N, self.S, self.device)

    @property
    @abstractmethod
    def rows(self) -> int:
        """Query rows."""

    @property
    @abstractmethod
    def last_row(self) -> int:
        """The last row of a thought among the query rows."""

    @abstractmethod
    def sees(self, row: Tensor, key: Tensor) -> Tensor:
        """Whether query rows see packed keys. Both are integer tensors that broadcast."""
