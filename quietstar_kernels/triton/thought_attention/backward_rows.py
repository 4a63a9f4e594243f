"""First step of thought_attention's backward: per query row rowsum(dO * O), the log of its denominator, and what it sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import Branches
from quietstar_kernels.triton._launch import Launch, Plan, cdiv
from quietstar_kernels.triton._math import LOG2_E
from quietstar_kernels.triton._rows import seen_by
from quietstar_kernels.triton._tiles import load_tile, padded
from quietstar_kernels.triton.configs import ATTENTION_BACKWARD_ROWS

# From 2^28 on, rounding alone moves a score so far that exp(score - lse) may overflow. Such a row has all its weight on one
# key, and its scores no gradient.
SATURATED = tl.constexpr(1 << 28)
TAIL = 64  # rows of the largest tile that reads the tables


@dataclass
class Rows:
    """Tables of the query rows for the next kernels. They are flat, with TAIL more numbers at the end that may be read.

    Attributes:
        delta: fp32 [B,H,rows], rowsum(dO * O).
        lse: fp32 [B,H,rows], in units of log 2; inf for a row that adds nothing, as it is off, is saturated, or has a NaN as
            its result. The delta of such a row is its dq: NaN in the last case, else 0.
        first, count: int32 [B,rows], the text that the row sees: ``count`` positions from ``first``.
        own_first, own_count: int32 [B,rows], the packed rows of its own branch that it sees. Both counts are 0 in a row that
            is off, and only there.
        oldest: int32 [B,rows], the smallest position id that the row sees; None without a window.
        dsinks: fp32 [B,H,blocks], still to be summed; None without sinks.
    """

    delta: Tensor
    lse: Tensor
    first: Tensor
    count: Tensor
    own_first: Tensor
    own_count: Tensor
    oldest: Tensor | None
    dsinks: Tensor | None


class Inputs(NamedTuple):
    """What the kernels of the gradients read."""

    grad_out: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    branches: Branches
    options: AttentionOptions
    tables: Rows
    plan: Plan


def row_tables(
    grad_out: Tensor, out: Tensor, lse: Tensor, branches: Branches, window: int | None, sinks: Tensor | None, known: Plan
) -> Rows:
    """Tables of the rows of grad_out and out [B,H,rows,E] and lse [B,H,rows]: all M rows, or the last R."""
    B, H, rows, E = out.shape
    config = ATTENTION_BACKWARD_ROWS
    blocks = cdiv(rows, config.blocks["BLOCK_M"])
    delta, shift = (out.new_empty(B * H * rows + TAIL, dtype=torch.float32) for _ in range(2))
    table = lambda: out.new_empty(B * rows + TAIL, dtype=torch.int32)  # noqa: E731
    first, count, own_first, own_count = (table() for _ in range(4))
    oldest = None if window is None else table()
    dsinks = None if sinks is None else out.new_empty((B, H, blocks), dtype=torch.float32)
    layout = tuple(x.contiguous() for x in branches[:3])

    def prepare() -> Launch:
        sizes = H, rows, branches.L, branches.R, branches.C, int(branches.full), window
        numbers = *grad_out.stride()[:3], *out.stride()[:3], *sizes
        return Launch(attention_rows, (blocks * B * H,), numbers, {"E": E, "BLOCK_E": padded(E)})

    tables = delta, shift, first, count, own_first, own_count, oldest, dsinks
    known.launch("rows", config, (grad_out, out, lse.contiguous(), sinks, *layout, *tables), prepare)
    return Rows(*tables)


@triton.jit(
    do_not_specialize=["H", "rows", "L", "R", "C", "full_own", "window"],
    do_not_specialize_on_alignment=["sinks", "lo", "table", "of_row"],
)
def attention_rows(
    grad_out, out, lse, sinks, lo, table, of_row,
    delta, shift, first_table, count_table, own_first_table, own_count_table, oldest_table, dsinks,
    stride_gb, stride_gh, stride_gm, stride_ob, stride_oh, stride_om,
    H, rows, L, R, C, full_own, window,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    m = row + (L + R - rows)
    first, last, own_first, own_last, on = seen_by(m, inside, lo + b * L, table + b * C * 3, of_row + b * R, L, full_own)
    if window is not None:
        # A text row's own_first is m + 1, a branch row's the first of its branch.
        oldest = last - first + (m - own_first) + 2 - window
        own_first = tl.maximum(own_first, m - window + 1)

    at = head * rows + row
    natural = tl.load(lse + at, mask=on, other=float("inf"))
    grad = load_tile(grad_out + b * stride_gb + h * stride_gh, row.to(tl.int64) * stride_gm, on, E, BLOCK_E)
    result = load_tile(out + b * stride_ob + h * stride_oh, row.to(tl.int64) * stride_om, on, E, BLOCK_E)
    result = result.to(tl.float32)
    poison = tl.sum(result * 0.0, 1)
    log2_sum = natural * LOG2_E + poison
    adds = on & (tl.abs(log2_sum) < SATURATED)
    d = tl.where(adds, tl.sum(grad.to(tl.float32) * result, 1), tl.where(log2_sum == log2_sum, 0.0, log2_sum))
    log2_sum = tl.where(adds, log2_sum, float("inf"))
    tl.store(delta + at, d, mask=inside)
    tl.store(shift + at, log2_sum, mask=inside)
    if dsinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        tl.store(dsinks + head * blocks + block, -tl.sum(tl.where(adds, tl.exp2(sink - log2_sum) * d, 0.0), 0))
    if h == 0:
        at = b * rows + row
        tl.store(first_table + at, first, mask=inside)
        tl.store(count_table + at, tl.where(on, last - first + 1, 0), mask=inside)
        tl.store(own_first_table + at, own_first, mask=inside)
        tl.store(own_count_table + at, tl.where(on, own_last - own_first + 1, 0), mask=inside)
        if window is not None:
            tl.store(oldest_table + at, oldest, mask=inside)
