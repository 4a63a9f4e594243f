"""Branches: which packed rows see which, as the back ends read it.

A packed sequence is ``[text (L) | branch rows (R)]``. A branch hangs on a text position t, its anchor, and has rows of its own
that stand together. Each of them sees the text in ``[lo[b, t], t]`` and, of its own branch, the rows up to itself, or all if
``full``. Text row t sees the text in ``[lo[b, t], t]`` (Quiet-STaR, arXiv 2403.09629, section 4.2 and figure 3: a thought is a
branch, and its rows see those before them).

In a tree, a branch may go on from the end of another, its parent: it is a node. Nodes stand in depth-first order. So the rows
of a node's subtree stand together, from the node's first row on, and row r sees row c of any branch exactly if c <= r < end(c),
where end(c) is the row after the subtree of c's node. (Masks with one interval of rows for each key: FlashMask, arXiv
2410.01359, section 3.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._operator import call, operator

ANCHOR, START, LENGTH = range(3)  # columns of the table
DEPTH, END, LEAF, PARENT = range(4)  # columns of the tree


class Size:
    """An attribute that is the size of a dimension of a tensor, another attribute."""

    def __init__(self, tensor: str, dim: int) -> None:
        self.tensor, self.dim = tensor, dim

    def __get__(self, holder: Any, _: type | None = None) -> int:
        size: int = getattr(holder, self.tensor).shape[self.dim]
        return size


class _Tensors(NamedTuple):
    lo: Tensor
    table: Tensor
    of_row: Tensor
    full: bool
    tree: Tensor | None = None
    path: Tensor | None = None


class Branches(_Tensors):
    """Tensors on one device.

    Attributes:
        lo: int32 [B,L], the first text position that position t sees.
        table: int32 [B,C,3], of each branch: its anchor, -1 if unused; its first row, from 0 to R; how many rows are live, 0 if
            unused. Anchors of used branches ascend, and so do first rows.
        of_row: int32 [B,R], the branch of each row, -1 where the row is off.
        full: a row sees all live rows of its branch, later ones too; in a tree only if its node is a leaf.
        tree: int32 [B,C,4] if branches hang on branches, of each node: how many rows are on its path before its first; the row
            after the last one of its subtree; 1 if no node has it as its parent, else 0; its parent, -1 for a root. A node's
            anchor is that of its root.
        path: int32 [B,R,2] if there is a tree, of each row: END of its node; how many rows are before it on its path.
    """

    B = Size("lo", 0)
    L = Size("lo", 1)
    C = Size("table", 1)
    R = Size("of_row", 1)

    @property
    def M(self) -> int:
        return self.L + self.R

    @property
    def device(self) -> torch.device:
        return self.lo.device

    def contiguous(self) -> list[Tensor | None]:
        """lo, table, of_row, tree and path, for kernels that know no strides."""
        tensors = self.lo, self.table, self.of_row, self.tree, self.path
        return [None if x is None else x.contiguous() for x in tensors]

    def live(self) -> Tensor:
        """bool [B,R]: the rows that are on."""
        return self.of_row >= 0

    def rows_on(self) -> Tensor:
        """bool [B,M]: text rows, and the branch rows that are on."""
        return torch.cat([torch.ones_like(self.lo, dtype=torch.bool), self.live()], 1)

    def column(self, column: int) -> Tensor:
        """int64 [B,R]: ANCHOR, START or LENGTH of each row's branch; 0 where the row is off."""
        return self.per_row(self.table[..., column])

    def per_row(self, of_branch: Tensor) -> Tensor:
        """int64 [B,R]: ``of_branch`` [B,C] for the branch of each row; 0 where the row is off."""
        if not self.C:
            return torch.zeros_like(self.of_row, dtype=torch.int64)
        return of_branch.long().gather(1, self.of_row.long().clamp(min=0)).masked_fill(~self.live(), 0)

    def row_in_branch(self) -> Tensor:
        """int32 [B,R]: 0 for the first row of a branch, -1 where the row is off."""
        r = torch.arange(self.R, device=self.device)
        return torch.where(self.live(), r - self.column(START), -1).int()

    def row_in_path(self) -> Tensor:
        """int64 [B,R]: as ``row_in_branch``; in a tree counted from the first row of the root."""
        row = self.row_in_branch().long()
        return row if self.tree is None else row + self.per_row(self.tree[..., DEPTH])

    def text_position_ids(self) -> Tensor:
        """int64 [B,L]: t - lo[b,t]."""
        return torch.arange(self.L, device=self.device) - self.lo.long()

    def position_ids(self) -> Tensor:
        """int64 [B,M]: t - lo[b,t] for text; that of the anchor + 1 + s for row s of a path; 0 for rows that are off."""
        text = self.text_position_ids()
        if self.R == 0:
            return text
        if self.L == 0:  # all rows are off
            return text.new_zeros(self.B, self.R)
        own = text.gather(1, self.column(ANCHOR)) + 1 + self.row_in_path()
        return torch.cat([text, own.masked_fill(~self.live(), 0)], 1)

    def parent_rows(self) -> Tensor:
        """int64 [B,M]: the row before each row on its path; -1 for the first row of a document, and where a row is off."""
        t = torch.arange(self.L, device=self.device)
        text = torch.where(self.lo < t, t - 1, -1)
        if not self.C:
            return pad(text, (0, self.R), value=-1)
        first = self.column(ANCHOR)
        if self.tree is not None:
            length = self.table[..., LENGTH].long()
            # From a node to the nearest one above it that has rows; the last one stands for the text.
            up = pad(torch.where(self.tree[..., PARENT] < 0, self.C, self.tree[..., PARENT].long()), (0, 1), value=self.C)
            skip = torch.where(pad(length, (0, 1), value=1) == 0, up, torch.arange(self.C + 1, device=self.device))
            for _ in range(self.C.bit_length()):  # over 1, 2, 4, .. nodes without rows
                skip = skip.gather(1, skip)
            above = self.per_row(skip.gather(1, up)[:, :-1])
            last = self.L + pad(self.table[..., START].long() + length, (0, 1)).gather(1, above) - 1
            first = torch.where(above < self.C, last, first)
        row = self.row_in_branch()
        r = torch.arange(self.L, self.M, device=self.device)
        return torch.cat([text, torch.where(row > 0, r - 1, torch.where(row == 0, first, -1))], 1)

    def dense_mask(self, window: int | None = None) -> Tensor:
        """bool [B,M,M], True where the row sees the column; see ``ThoughtLayout.dense_mask``."""
        B, L, R = self.B, self.L, self.R
        t, r = (torch.arange(size, device=self.device) for size in (L, R))
        seen = torch.zeros((B, self.M, self.M), dtype=torch.bool, device=self.device)
        seen[:, :L, :L] = (t >= self.lo[:, :, None]) & (t <= t[:, None])
        if R and L:  # else nothing is on
            seen[:, L:, :L] = seen[:, :L, :L].gather(1, self.column(ANCHOR)[:, :, None].expand(B, R, L))
            start = self.column(START)[:, :, None]
            own = (r >= start) & (r < (start + self.column(LENGTH)[:, :, None] if self.full else r[:, None] + 1))
            if self.tree is not None:
                end, leaf = (self.per_row(self.tree[..., column]) for column in (END, LEAF))
                path = (r <= r[:, None]) & (r[:, None] < end[:, None, :]) & self.live()[:, None, :]
                own = path | (own & (leaf > 0)[:, :, None]) if self.full else path
            seen[:, L:, L:] = own
            seen[:, L:] &= self.live()[:, :, None]
        if window is not None:
            position = self.position_ids()
            seen &= position[:, None, :] > position[:, :, None] - window
        return seen


def of_rows(table: Tensor, rows: int, spacing: int | None = None) -> Tensor:
    """int32 [B,R] as ``Branches.of_row``, for a table [B,C,3] and R ``rows``.

    Args:
        spacing: rows between first rows, if these are 0, spacing, 2 * spacing, ...
    """
    B, C = table.shape[:2]
    r = torch.arange(rows, device=table.device, dtype=torch.int32)
    if not C:
        return r.new_full((B, rows), -1)
    if spacing is not None:
        branch = (r // spacing).expand(B, rows)
    else:  # the last branch that starts at the row or before: of those that start at one place, only the last has rows
        start = table[..., START].contiguous()
        branch = torch.searchsorted(start, r.expand(B, rows).contiguous(), right=True, out_int32=True) - 1
    start, length = (table[..., column].gather(1, branch.long()) for column in (START, LENGTH))
    return torch.where(r - start < length, branch, -1)


def _tree_of(parent: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    B, C = parent.shape
    node = torch.arange(C + 1, device=parent.device).expand(B, C + 1)
    # One more node stands for the parent of the roots.
    up = pad(torch.where(parent < 0, C, parent.long()), (0, 1), value=C)
    length = pad(length.long(), (0, 1))
    depth, last, size = length.gather(1, up), node, torch.ones_like(node)
    leaf = torch.ones_like(node).scatter(1, up, 0)
    for _ in range(C.bit_length()):  # from each node to the one 1, 2, 4, .. above it
        depth = depth + depth.gather(1, up)
        last = last.scatter_reduce(1, up, last, "amax")
        size = size.scatter_add(1, up, size)
        up = up.gather(1, up)
    end = length.cumsum(1).gather(1, last)
    tree = torch.stack([depth, end, leaf, pad(parent, (0, 1))], -1)[:, :C]
    return tree.int().contiguous(), (size == last - node + 1)[:, :C].contiguous()


def _fake_tree(parent: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    return parent.new_empty((*parent.shape, 4), dtype=torch.int32), parent.new_empty(parent.shape, dtype=torch.bool)


_tree = operator(_tree_of, _fake_tree, instead="numbers of rows have none")


def tree_of(parent: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The tree of ``Branches`` int32 [B,C,4], and bool [B,C]: whether the nodes of a node's subtree stand together, after it.

    One operator, since torch.compile would make a graph for each number of its steps.

    Args:
        parent: integer [B,C], -1 for roots; before its children.
        length: integer [B,C], rows of each node.
    """
    tree, together = call(_tree, parent, length)
    return tree, together
