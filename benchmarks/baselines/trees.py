"""Cases of trees, and what computes them without a tree: a sequence per leaf, and branches that repeat what is above them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.baselines.attention import flex, no_flex_backward
from benchmarks.baselines.branches import BranchCase, Repeated, repeated, repeated_needs, work_of
from benchmarks.harness.candidate import PACKAGE, Candidate
from benchmarks.harness.case import Work
from quietstar_kernels import ThoughtLayout, thought_attention
from quietstar_kernels.branches import END

SEQUENCES, PATHS = "SDPA, a sequence per leaf", "branches, paths repeated"


@dataclass(frozen=True, kw_only=True)
class TreeCase(BranchCase):
    """Attention of C nodes with F leaves each. All have S rows.

    Attributes:
        grid: "headline" and "tree": nodes hang on the last text token. "chain": each goes on from the one before, and the text
            is the first of them.
    """

    op: ClassVar[str] = "trees"
    size_names = tuple("LCFSHGK")
    copies = ("sequences", "paths")
    S: int = 64
    F: int = 4

    @cached_property
    def layout(self) -> ThoughtLayout:
        each = self.F + 1  # places of a node and its leaves
        if self.grid == "chain":
            parents = [turn * each - 1 for turn in range(self.C) for _ in range(each)][:-1]
        else:
            parents = [parent for node in range(self.C) for parent in (-1, *[node * each] * self.F)]
        anchors = torch.full((1, len(parents)), self.L - 1)
        return ThoughtLayout.tree(anchors, torch.tensor([parents]), torch.full_like(anchors, self.S), self.L).to(self.device)

    def sees(self, row: Tensor, key: Tensor) -> Tensor:
        anchor, end = self._tables[0], self._ends
        return (key <= anchor[row]) | ((key <= row) & (row < end[key]))

    @cached_property
    def _ends(self) -> Tensor:
        """int64 [M]: the row after the subtree of a row's node; 0 for text."""
        L, branches = self.L, self.layout.branches
        assert branches.tree is not None
        return torch.cat([torch.zeros(L).to(branches.tree), L + branches.tree[0, branches.of_row[0].long(), END]]).long()

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The packed rows of each leaf's sequence: all that its last row sees."""
        last = self._ends[self.L :].unique() - 1
        return [seen.nonzero().flatten() for seen in self.sees(last[:, None], torch.arange(self.M, device=self.device))]

    @cached_property
    def sequences(self) -> list[Tensor]:
        """int64 [n,rows] for each length."""
        lengths = sorted({len(rows) for rows in self.leaves})
        return [torch.stack([rows for rows in self.leaves if len(rows) == length]) for length in lengths]

    @cached_property
    def paths(self) -> list[Tensor]:
        """int64 [1,rows]: the text once, then what each leaf's sequence has after it."""
        return [torch.cat([torch.arange(self.L, device=self.device), *(rows[self.L :] for rows in self.leaves)])[None]]

    @cached_property
    def branches(self) -> ThoughtLayout:
        """Of ``paths``."""
        lengths = torch.tensor([[len(rows) - self.L for rows in self.leaves]], device=self.device)
        return ThoughtLayout.packed(torch.full_like(lengths, self.L - 1), lengths, self.L)

    @property
    def pairs(self) -> int:
        return pairs_of(self.layout)


def pairs_of(layout: ThoughtLayout) -> int:
    """Pairs of a row and a key it sees: all before it on its path, and itself."""
    return int((layout.position_ids() + 1).sum())


def repeated_keys(case: TreeCase) -> Repeated:
    """Causal SDPA of ready-made sequences, whose keys and values a call repeats for the query heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(case.H // case.G, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    return Repeated(attend)


def packed(case: TreeCase) -> Repeated:
    """Our own branches without parents."""
    return Repeated(lambda q, k, v: thought_attention(q, k, v, case.branches), "paths")


def packed_needs(case: TreeCase) -> Work:
    return work_of(case, pairs_of(case.branches))


BASELINES = [
    Candidate(SEQUENCES, repeated, needs=repeated_needs),
    Candidate(f"{SEQUENCES}, keys repeated", repeated_keys, needs=repeated_needs),
    Candidate("FlexAttention, compiled", flex, needs=lambda case: case.work(), why_not=no_flex_backward, compiles=True),
    Candidate(PATHS, packed, PACKAGE, needs=packed_needs),
]


def times_the_pairs(case: TreeCase, baseline: Candidate) -> float:
    """How many times our pairs of query and key a baseline computes."""
    return baseline.needs(case).flops / case.work().flops


def sizes() -> list[dict[str, Any]]:
    """The cases, the most important first."""
    found = [{}, {"grid": "chain", "L": 64, "C": 12}, {"grid": "tree", "L": 2048, "C": 4, "S": 256}]
    return [size | {"what": what} for size in found for what in ("forward", "forward+backward")]
