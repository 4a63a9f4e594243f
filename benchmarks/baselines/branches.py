"""Cases of branches: which text and branches they have, and what computes them without packing.

Without packing, every branch comes with a copy of its text. A baseline gets such copies ready-made, as a model would give them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.baselines.attention import dense, dense_needs, flex, no_flex_backward, no_flex_flash
from benchmarks.baselines.exact import judge_rows, only_rows
from benchmarks.baselines.packed import Attention
from benchmarks.harness.candidate import Candidate, not_installed
from benchmarks.harness.case import Case, Inputs, Work
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.branches import ANCHOR, LENGTH, START

SEED = 20
PROMPTS, DOCUMENTS = 16, 4
CHECKED = 48  # branch rows whose result is compared


@dataclass(frozen=True)
class Repeated:
    """A candidate that takes copies of rows, by default every branch after a copy of its text.

    Attributes:
        rows: which of the case's ``copies``.
    """

    attend: Attention
    rows: str = "sequences"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v)


@dataclass(frozen=True, kw_only=True)
class BranchCase(Case):
    """Attention with C branches of up to S rows.

    Attributes:
        grid: "prompts": 16 packed prompts of L/4 to L tokens, with C completions each of S/16 to S rows, log-uniform.
            "drafter": 4 packed documents with C branches at random anchors, whose rows see each other; branch rows are the
            only queries. Any other: one prompt of L tokens with C completions.
    """

    op: ClassVar[str] = "branches"
    size_names = tuple("LCSHGK")
    copies: ClassVar[tuple[str, ...]] = ("sequences",)
    grid: str = "headline"
    L: int = 512
    C: int = 8
    S: int = 256
    H: int = 8
    G: int = 2
    K: int = 64

    @cached_property
    def layout(self) -> ThoughtLayout:
        return _layouts.get(self.grid, _prompt)(self).to(self.device)

    @property
    def B(self) -> int:
        return 1

    @property
    def M(self) -> int:
        return self.layout.M

    @property
    def skipped(self) -> int:
        """Packed rows before the first query row."""
        return self.layout.L if self.grid == "drafter" else 0

    @property
    def rows(self) -> int:
        return self.M - self.skipped

    def sees(self, row: Tensor, key: Tensor) -> Tensor:
        """Whether query rows see packed keys. Both are integer tensors that broadcast.

        Of what FlexAttention's FLASH back end knows in PyTorch 2.11: comparisons, and int32 tensors indexed by rows.
        """
        anchor, oldest, start, end = self._tables
        row = row + self.skipped
        own = (key >= start[row]) & (key < end[row])
        return ((key <= anchor[row]) & (key >= oldest[row])) | (own if self.layout.own == "full" else own & (key <= row))

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """int32 [M] each: the text position a row is at, the first that it sees, and where its own rows start and end; nowhere
        for text."""
        layout, branches = self.layout, self.layout.branches
        t = torch.arange(layout.L, device=self.device)
        start = layout.L + branches.column(START)[0]
        anchor = torch.cat([t, branches.column(ANCHOR)[0]])
        own = torch.cat([0 * t, start]), torch.cat([0 * t, start + branches.column(LENGTH)[0]])
        anchor, oldest, *own = (x.int() for x in (anchor, layout.lo[0][anchor], *own))
        return anchor, oldest, own[0], own[1]

    @cached_property
    def sequences(self) -> list[Tensor]:
        """int64 [n,rows]: the packed rows of each branch after those of its text, for all branches of one length."""
        layout = self.layout
        found: dict[int, list[Tensor]] = {}
        for anchor, start, length in layout.branches.table[0].tolist():
            lo = int(layout.lo[0, anchor])
            rows = torch.cat([torch.arange(lo, anchor + 1), layout.L + torch.arange(start, start + length)])
            found.setdefault(len(rows), []).append(rows)
        return [torch.stack(rows).to(self.device) for rows in found.values()]

    def work(self) -> Work:
        """Of the pairs of query row and visible key. Bytes as in the benchmark of ``thought_attention``."""
        queries, keys = (h * n * self.K * self.dtype.itemsize for h, n in ((self.H, self.rows), (self.G, self.M)))
        forward = 2 * queries + 2 * keys
        return replace(work_of(self, self.pairs), bytes=forward + (self.what == "forward+backward") * 4 * (queries + keys))

    @property
    def pairs(self) -> int:
        row = torch.arange(self.skipped, self.M, device=self.device)
        anchor, oldest, start, end = (x[row].long() for x in self._tables)
        last = end if self.layout.own == "full" else torch.minimum(row + 1, end)
        return int((anchor + 1 - oldest + (last - start).clamp(min=0)).sum())

    @property
    def pairs_repeated(self) -> int:
        """The same of copies of the text with one branch each."""
        return sum(len(rows) * rows.shape[1] * (rows.shape[1] + 1) // 2 for rows in self.sequences)

    def inputs(self, seed: int) -> Inputs:
        shapes = {"q": (self.H, self.rows), "k": (self.G, self.M), "v": (self.G, self.M), "grad_out": (self.H, self.rows)}
        packed = {name: self.randn(4 * seed + i, 1, *shape, self.K) for i, (name, shape) in enumerate(shapes.items())}
        return packed | self._copies(packed)

    def _copies(self, packed: Inputs) -> Inputs:
        """q, k, v and grad_out of each of ``copies``; none for the drafter, whose text has no queries."""
        found: Inputs = {}
        for name in self.copies if not self.skipped else ():
            copies: list[Tensor] = getattr(self, name)
            count = torch.cat([rows.flatten() for rows in copies]).bincount(minlength=self.M)
            tensors = [packed[x][0] for x in "qkv"] + [packed["grad_out"][0] / count[:, None]]  # as the copies' are added up
            found[name] = [tuple(x[:, rows].transpose(0, 1).contiguous() for x in tensors) for rows in copies]
        return found

    def call(self, function: Attention, inputs: Inputs) -> list[tuple[Tensor, ...]]:
        """out, and with a backward dq, dk and dv; of each batch of copies for a candidate that takes these."""
        calls = inputs[function.rows] if isinstance(function, Repeated) else [tuple(inputs[x] for x in _NAMES)]
        if self.what == "forward":
            with torch.no_grad():
                return [(function(q, k, v),) for q, k, v, _ in calls]
        results = []
        for q, k, v, grad_out in calls:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
        return results

    def check(self, function: Attention) -> None:
        """Compare some branch rows with exact ones. The output's gradient is 0 in all others."""
        inputs = self.inputs(seed=0)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(self.layout.R, generator=generator)[:CHECKED].sort().values.to(self.device)
        rows = rows + self.layout.L - self.skipped
        inputs["grad_out"] = only_rows(inputs["grad_out"], rows)
        inputs |= self._copies(inputs)
        results = self.call(function, inputs)
        if isinstance(function, Repeated):
            got = self._gathered(results, getattr(self, function.rows))
        else:
            got = list(results[0])
        judge_rows(self, rows, got, *(inputs[name] for name in _NAMES))

    def _gathered(self, results: list[tuple[Tensor, ...]], copies: list[Tensor]) -> list[Tensor]:
        """Results of copies in the shapes of packed ones: the gradients of a row's copies are added up."""
        heads = (self.H, self.H, self.G, self.G)
        packed = [torch.zeros(h, self.M, self.K, device=self.device) for h, _ in zip(heads, results[0], strict=False)]
        for rows, result in zip(copies, results, strict=True):
            packed[0][:, rows] = result[0].detach().float().transpose(0, 1)
            for to, x in zip(packed[1:], result[1:], strict=True):
                to.index_add_(1, rows.flatten(), x.float().transpose(0, 1).flatten(1, 2))
        return [x[None] for x in packed]


_NAMES = ("q", "k", "v", "grad_out")


def _prompt(case: BranchCase) -> ThoughtLayout:
    anchors = torch.full((1, case.C), case.L - 1)
    return ThoughtLayout.packed(anchors, torch.full_like(anchors, case.S), case.L)


def _prompts(case: BranchCase) -> ThoughtLayout:
    generator = torch.Generator().manual_seed(SEED)
    text = torch.randint(case.L // 4, case.L + 1, (PROMPTS,), generator=generator)
    u = torch.rand(PROMPTS * case.C, generator=generator)
    lengths = (case.S / 16 * torch.exp(u * math.log(16))).round().long()
    ends = text.cumsum(0)
    lo = (ends - text).repeat_interleave(text)[None]
    return ThoughtLayout.packed((ends - 1).repeat_interleave(case.C)[None], lengths[None], lo=lo)


def _drafter(case: BranchCase) -> ThoughtLayout:
    generator = torch.Generator().manual_seed(SEED)
    anchors = torch.randperm(case.L, generator=generator)[: case.C].sort().values[None]
    lo = (torch.arange(case.L) // (case.L // DOCUMENTS) * (case.L // DOCUMENTS))[None]
    return ThoughtLayout.packed(anchors, torch.full_like(anchors, case.S), lo=lo, own="full")


_layouts: dict[str, Callable[[BranchCase], ThoughtLayout]] = {"prompts": _prompts, "drafter": _drafter}


def work_of(case: BranchCase, pairs: int) -> Work:
    """FLOPs of so many pairs of query row and key."""
    return Work(4 * case.H * case.K * pairs * (3.5 if case.what == "forward+backward" else 1))


def repeated(case: BranchCase) -> Repeated:
    """Causal SDPA of ready-made copies, without padding."""
    return Repeated(partial(scaled_dot_product_attention, is_causal=True, enable_gqa=case.H != case.G))


def repeated_needs(case: BranchCase) -> Work:
    return work_of(case, case.pairs_repeated)


def grouped(case: BranchCase) -> Attention:
    """PrefixGrouper: the prompt once, then each completion over the prompt and itself. Its masks are made beforehand."""
    from prefix_grouper import PrefixGrouper

    grouper = PrefixGrouper([[case.L, *[case.S] * case.C]], device=case.device)
    last = torch.ones(case.S, case.L + case.S, dtype=torch.bool, device=case.device).tril(case.L)
    mask = torch.zeros(last.shape, dtype=case.dtype, device=case.device).masked_fill_(~last, -math.inf)

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        whole = q.shape[2] == k.shape[2]
        options: dict[str, Any] = {"is_causal": True} if whole else {"attn_mask": mask}
        return scaled_dot_product_attention(q, k, v, enable_gqa=case.H != case.G, **options).transpose(1, 2)

    return lambda q, k, v: grouper.forward(attend, q, k, v).transpose(1, 2)


def no_copies(case: BranchCase) -> str | None:
    return "the text has no queries, so copies of it would be compared with less work" if case.skipped else None


def no_groups(case: BranchCase) -> str | None:
    if case.grid in _layouts:
        return "it takes one row for each prompt, with padding"
    return not_installed("prefix-grouper")


BASELINES = [
    Candidate("SDPA, repeated prompts", repeated, needs=repeated_needs, why_not=no_copies),
    Candidate("FlexAttention, compiled", flex, why_not=no_flex_backward, compiles=True),
    Candidate(
        "FlexAttention, FLASH", partial(flex, options={"BACKEND": "FLASH"}), "flash-attn-4", no_flex_flash, compiles=True
    ),
    Candidate("PrefixGrouper", grouped, "prefix-grouper", no_groups),
    Candidate("SDPA, dense mask", dense, needs=dense_needs),
]


def sizes() -> list[dict[str, Any]]:
    """The cases, the most important first."""
    found: list[dict[str, Any]] = [
        {"L": 512, "S": 256},
        {"grid": "prompt", "L": 2048, "S": 256},
        {"grid": "prompts", "L": 512, "S": 512},
        {"grid": "drafter", "L": 4096, "C": 256, "S": 16},
        *({"grid": "prompt", "L": L, "S": S} for L, S in ((512, 64), (2048, 1024), (512, 1024))),
    ]
    return [size | {"what": what} for size, what in itertools.product(found, ("forward", "forward+backward"))]
