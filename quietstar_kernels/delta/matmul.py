"""thought_delta in matrix products, chunk by chunk; forward and backward are plain PyTorch.

**Text.** In a chunk of ``CHUNK`` rows, w solves a triangular system (the WY form: arXiv 2406.06484, section 3.2), and a loop
over chunks carries the state. This leaves out, w, and the state at the start of each chunk.

**Branches.** Row r of a branch on anchor p needs q S and k S of the state S at p, decayed by the branch's rows up to r. There
are two ways to it, which give the same numbers to rounding:

- *reads*: no state of a branch exists. With S_c at the start of p's chunk, x S = e^(G_p) x S_c + sum over j <= p of
  e^(G_p - G_j) (x k_j) w_j, for blocks of rows whose anchors are in one chunk. The branch is then one from a zero state whose
  values are v - k S. The device alone makes the tables.
- *states*: the state at each anchor, once, then chunks of branch rows as in the text, those of one level of the tree of chunks
  at once; only this serves trees. The host makes the plan, once per layout.

**Choice.** With K = E, reads cost 4 K^2 + 8 CHUNK K + 6 S K multiplications and additions per row for branches of S rows, and
states 6 K^2 + 6 CHUNK K + 2 CHUNK K^2 / S; they also keep K^2 / S numbers per row. These are equal at S of about 3/8 K. But
states fill their last chunks only in part, and take S / CHUNK steps where reads take one. So ``way`` takes reads up to S = K.
With a decay for each channel, reads cost log2(CHUNK) times the products with k, and ``way`` takes them up to 3/4 CHUNK.

**Decay.** g is summed from one row to another, never by a difference of two sums, so that a strong decay costs no digits. With
a decay for each channel, e^(sum from j to i) is split where the binary numbers of i and j part: both factors are at most 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ..branches import ANCHOR, LENGTH, START
from ..checks import has_values, on_host
from ..layout import ThoughtLayout
from . import CHUNK

BLOCK = 64  # most rows of a block that reads one chunk


def thought_delta(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, layout: ThoughtLayout, text: tuple | None
) -> tuple[Tensor, Tensor]:
    """As the reference's function."""
    L, R, H = layout.L, layout.R, v.shape[1]
    if g.shape[-1] > 1:  # the decay is part of the keys
        q, k = spread(q, H), spread(k, H)
    seen = masks_of(layout)
    if text is None:
        of_text: list[Any] = [x if x is None else x[:, :, :L] for x in (k, v, g, q, beta)]
        text_out, past = text_chunks(seen, None, *of_text)
    else:
        text_out, past = text_chunks(seen, None, *text)
    own: list[Any] = [x if x is None else x[:, :, x.shape[2] - R :] for x in (q, k, v, g, beta)]
    if R and L and layout.P:
        by_reads = way(layout, k.shape[-1], g.shape[-1] > 1) == "reads"
        out, w = (_by_reads if by_reads else _by_states)(layout, past, *own)
    else:  # all are off
        out = w = own[2] * 0
    if text_out is None:
        return out, w
    text_out, text_w = (x.flatten(2, 3)[:, :, :L] for x in (text_out, past.w))
    return torch.cat([text_out, out], 2), torch.cat([text_w, w], 2)


def way(layout: ThoughtLayout, K: int, channels: bool = False) -> str:
    """ "reads" or "states", see the module's text; ``channels``: with a decay for each channel."""
    if layout.parent is not None:
        return "states"
    short = layout.rows <= (3 * CHUNK // 4 if channels else max(K, CHUNK))
    if layout.packed_rows is not None:  # a block for each branch, as long as the longest
        short = short and layout.P * layout.rows <= 4 * layout.R
    return "reads" if short or not has_values(layout.lo) or torch.compiler.is_compiling() else "states"


class Chunks(NamedTuple):
    """The text as its readers need it.

    Attributes:
        k: [B,G,n,CHUNK,K]; with a decay for each channel [B,H,n,CHUNK,K].
        w: [B,H,n,CHUNK,E].
        g: [B,H,n,CHUNK,1 or K].
        seen: bool [B,1,n,CHUNK,1+CHUNK], as ``chunk_masks`` gives it.
        states: [B,H,n,K,E], at the start of each chunk.
    """

    k: Tensor
    w: Tensor
    g: Tensor
    seen: Tensor
    states: Tensor


def masks_of(layout: ThoughtLayout) -> Tensor:
    """``chunk_masks``, made once."""
    return layout.table("delta chunks", lambda layout: chunk_masks(layout.lo))


def chunk_masks(lo: Tensor) -> Tensor:
    """bool [B,1,n,CHUNK,1+CHUNK]: whether a row of the text sees what is before its chunk, and each row of the chunk."""
    B, L = lo.shape
    n = -(-L // CHUNK)
    if n * CHUNK > L:
        lo = torch.cat([lo, lo[:, -1:].expand(B, n * CHUNK - L)], 1)
    lo = lo.view(B, 1, n, CHUNK, 1)
    begun = lo < torch.arange(0, n * CHUNK, CHUNK, device=lo.device)[:, None, None]
    return torch.cat([begun, (lo == lo.mT) & _causal(CHUNK, lo.device)[:, 1:]], -1)


def known(x: Tensor) -> bool:
    """Whether tables may be made for its values: nothing waits for them, and no compiled function keeps them."""
    return on_host(x) and not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _causal(rows: int, device: torch.device) -> Tensor:
    """bool [rows,1+rows]: all rows see what is before them, and the rows up to themselves."""
    return torch.ones(rows, rows + 1, dtype=torch.bool, device=device).tril(1)


def text_chunks(
    seen: Tensor, states: Tensor | None, k: Tensor, w: Tensor, g: Tensor, q: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor | None, Chunks]:
    """From what the rows of a text left: k [B,G,L,K], w [B,H,L,E], g [B,H,L,1 or K]; with beta, w is v.

    Returns what q reads, [B,H,n,CHUNK,E], and the chunks.
    """
    out, (k, w, g) = None, (_chunked(x) for x in (k if g.shape[-1] == 1 else spread(k, w.shape[1]), w, g))
    if states is None:
        states = w.new_zeros(*w.shape[:2], min(w.shape[2], 1), k.shape[-1], w.shape[-1])
        if w.shape[2]:
            q, beta = (x if x is None else _chunked(x) for x in (q, beta))
            out, w, states = _recur(
                states[:, :, 0], lambda x: x.unbind(2), lambda x: torch.stack(x, 2), None, seen, q, k, w, g, beta
            )
    return out, Chunks(k, w, g, seen, states)


def _chunked(x: Tensor) -> Tensor:
    """[B,*,L,K] to [B,*,n,CHUNK,K], with zeros after the end."""
    more = -x.shape[2] % CHUNK
    x = pad(x, (0, 0, 0, more)) if more else x
    return x.unflatten(2, (x.shape[2] // CHUNK, CHUNK))


def spread(x: Tensor, H: int) -> Tensor:
    """[*,G,..] to [*,H,..] in dimension 1."""
    return x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], 1)


def _decay(g: Tensor, seen: Tensor) -> Tensor | None:
    """[..,rows,1+rows]: of all that a row sees, how much of it is left when the row reads. None if each channel has its own."""
    if g.shape[-1] > 1:
        return None
    rows = g.shape[-2]
    after = torch.ones(rows, rows + 1, dtype=torch.bool, device=g.device).tril()
    return g.where(after, 0).cumsum(-2).masked_fill(~seen, -torch.inf).exp()


def _start(g: Tensor, seen: Tensor, decay: Tensor | None) -> Tensor:
    """[..,rows,1 or K]: how much each row sees of the state before its chunk."""
    return g.cumsum(-2).exp() * seen[..., :1] if decay is None else decay[..., :1]


def _end(g: Tensor, seen: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """How much is left after the chunk: of each row [..,rows,1 or K], and of the state before it [..,1 or K,1]."""
    if decay is None:
        return _after(g).exp() * seen[..., -1, 1:, None], (g.sum(-2).exp() * seen[..., -1, :1])[..., None]
    return decay[..., -1, 1:, None], decay[..., -1:, :1]


def _after(g: Tensor) -> Tensor:
    """The sum of g [..,rows,*] over the rows after each."""
    return pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def finite(x: Tensor) -> Tensor:
    """x, 0 where that is not finite."""
    return x.where(x.isfinite(), 0)


def _scores(
    xs: Sequence[Tensor],
    k: Tensor,
    g: Tensor,
    seen: Tensor,
    decay: Tensor | None,
    of_row: Callable[[Tensor], Tensor] = lambda table: table,
) -> list[Tensor]:
    """x k^T with decay, [..,rows of x,rows of k]. ``of_row`` takes tables of the rows of k to those of x, if these differ."""
    if decay is not None:
        return [spread(x @ k.mT, decay.shape[1]) * decay[..., 1:] for x in xs]
    rows = k.shape[-2]
    i = torch.arange(rows, device=k.device)
    part = i[:, None] ^ i

    def of_size(size: int, k: Tensor, g: Tensor, *xs: Tensor) -> list[Tensor]:
        """The scores of rows in one half of a block of 2 size rows with those in the other."""
        blocks = pad(g, (0, 0, 0, -rows % size)).unflatten(-2, (-1, size))
        before, after = (y.flatten(-3, -2)[..., :rows, :].exp() for y in (blocks.cumsum(-2), _after(blocks)))
        apart = of_row(seen[..., 1:] & (part >= size) & (part < 2 * size))
        before, keys = of_row(before), (k * after).mT
        return [((x * before) @ keys) * apart for x in xs]

    same, size = of_row(seen[..., 1:] & (part == 0)), 1
    scores = [(x @ k.mT) * same for x in xs]
    while size < rows:
        # A backward makes these again, which would be four more copies of x and k for each size.
        more = checkpoint(of_size, size, k, g, *xs, use_reentrant=False, preserve_rng_state=False)
        scores, size = [x + y for x, y in zip(scores, more, strict=True)], 2 * size
    return scores


def _apply(x: Tensor, S: Tensor) -> Tensor:
    """x [*,G,..,rows,K] times S [*,H,..,K,E]: [*,H,..,rows,E]. A product has all heads that share x."""
    G, H, E = x.shape[1], S.shape[1], S.shape[-1]
    if G == H:
        return x @ S
    y = x @ S.unflatten(1, (G, H // G)).movedim(2, -2).flatten(-2)
    return y.unflatten(-1, (H // G, E)).movedim(-2, 2).flatten(1, 2)


def _read(x: Tensor, S: Tensor, start: Tensor) -> Tensor:
    """What x reads of the state before its chunk."""
    return _apply(x, S) * start if start.shape[-1] == 1 else (x * start) @ S


def _plus(x: Tensor, a: Tensor, b: Tensor, times: int = 1) -> Tensor:
    """x + times a b."""
    return torch.baddbmm(*(y.flatten(0, -3) for y in (x, a, b)), alpha=times).view_as(x)


def _recur(
    S: Tensor, cut: Callable[[Tensor], Sequence[Tensor]], join: Callable[[list[Tensor]], Tensor],
    above: Sequence[Tensor] | None, seen: Tensor, q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Chunks [..,rows,*], level after level: out (None without q), w, and the state before each chunk.

    Args:
        S: those before the chunks of the first level.
        cut, join: from all chunks to those of each level, and back.
        above: of each level but the first, where in the level before the parents are; None if in the same places.
    """
    H, decay = v.shape[1], _decay(g, seen)
    start, w, reads = _start(g, seen, decay), v, None
    scores = _scores([x for x in (q, None if beta is None else k) if x is not None], k, g, seen, decay)
    if beta is not None:
        both = torch.cat([v * beta, spread(k, H) * (start * beta)], -1)
        both = torch.linalg.solve_triangular(scores[-1] * beta, both, upper=False, unitriangular=True)
        w, keys = both.split([v.shape[-1], k.shape[-1]], -1)
        reads = cut(keys)
    end, carry = _end(g, seen, decay)
    levels = list(zip(cut(w), cut((spread(k, H) * end).mT), cut(carry), strict=True))
    states: list[Tensor] = []
    writes: list[Tensor] = []
    for i, (write, end, carry) in enumerate(levels):
        states.append(S)
        writes.append(write if reads is None else _plus(write, reads[i], S, -1))
        if i + 1 < len(levels):
            S = torch.addcmul(end @ writes[-1], S, carry)
            S = S if above is None else _take(S, above[i])
    before, w = join(states), join(writes)
    return None if q is None else _plus(_read(q, before, start), scores[0], w), w, before


def _by_reads(
    layout: ThoughtLayout, past: Chunks, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    own: Rows | _Grid = _Grid(layout.S) if layout.packed_rows is None else layout.table("delta branches", _branch_rows)
    blocks = layout.table("delta blocks", _blocks)
    q, k, v, g = (own.split(x) for x in (q, k, v, g))
    seen = _causal(layout.S, g.device)
    decay = _decay(g, seen)
    start = _start(g, seen, decay)
    xs = [q] if beta is None else [q, k]
    scores = _scores(xs, k, g, seen, decay)
    # What they read of the state at the anchor, as much as is left of it.
    found = read([blocks.rows.split(own.joined(x * start if decay is None else x)) for x in xs], blocks, past)
    found = [own.split(blocks.rows.joined(x)) * (1 if decay is None else start) for x in found]
    w = v
    if beta is not None:
        beta = own.split(beta)
        w = torch.linalg.solve_triangular(scores[1] * beta, (v - found[1]) * beta, upper=False, unitriangular=True)
    return own.joined(_plus(found[0], scores[0], w)), own.joined(w)


class _Grid(NamedTuple):
    """As ``Rows``, for blocks of S rows one after another."""

    S: int

    def split(self, x: Tensor) -> Tensor:
        return x.contiguous().unflatten(2, (x.shape[2] // self.S, self.S))

    def joined(self, x: Tensor) -> Tensor:
        return x.flatten(2, 3)


class Rows:
    """Where rows [B,*,R,K] stand in blocks [A,*,n,b,K], each row at most once.

    Attributes:
        batch: int64 [A,n], of each block.
        row: int64 [A,n,b], -1 for none, which makes zeros.
        slot: int64 [B,R], the place of each row among the A * n * b, -1 for none.
        place: int64 [A,n,b], as ``row`` among the B * R.
        full: of row and slot, whether they are known to hold no -1.
        grid: whether they are all rows in their order.
    """

    def __init__(self, batch: Tensor, row: Tensor, slot: Tensor):
        self.batch, self.row, self.slot = batch, row, slot
        B, R = slot.shape
        self.place = torch.where(row < 0, -1, batch[..., None] * R + row)
        self.full = tuple(known(x) and bool((x >= 0).all()) for x in (row, slot))
        self.grid = known(row) and row.shape[0] == B and torch.equal(row.flatten(1), torch.arange(R).expand(B, R))

    def split(self, x: Tensor) -> Tensor:
        if self.grid:
            return x.unflatten(2, self.row.shape[1:])
        return _Rows.apply(x.transpose(1, 2).flatten(0, 1), self.place, self.slot, *self.full).movedim(3, 1).contiguous()

    def joined(self, x: Tensor) -> Tensor:
        if self.grid:
            return x.flatten(2, 3)
        return _Rows.apply(x.movedim(1, 3).flatten(0, 2), self.slot, self.place, *self.full[::-1]).transpose(1, 2)


class _Rows(torch.autograd.Function):
    """Rows of x [rows,..] at places, zeros where these are -1, if any; ``back`` has the place that each row went to."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, back: Tensor, full: bool, back_full: bool) -> Tensor:
        rows = x.index_select(0, (index if full else index.clamp(min=0)).flatten()).unflatten(0, index.shape)
        return rows if full else rows.masked_fill_((index < 0)[..., None, None], 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, index, back, *ctx.full = inputs
        ctx.save_for_backward(index, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        index, back = ctx.saved_tensors
        return _Rows.apply(grad.flatten(0, index.ndim - 1), back, index, *ctx.full[::-1]).flatten(0, back.ndim - 1), *[None] * 4


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [rows,..] at index: [*index,..], of which some may be the same. The gradient is a sum in a fixed order."""
    if x.device.type == "cpu":
        return x.index_select(0, index.flatten()).unflatten(0, index.shape)
    return x[index]  # its gradient is sorted there, where that of index_select races


def _at_chunk(x: Tensor, batch: Tensor, chunk: Tensor) -> Tensor:
    """x [B,h,n,..] in chunks [A,1,*] of batch rows [A,1,*]: [A,h,*,..]."""
    head = torch.arange(x.shape[1], device=x.device).view(-1, *[1] * (chunk.ndim - 2))
    return _take(x.flatten(0, 2), (batch * x.shape[1] + head) * x.shape[2] + chunk)


class Blocks(NamedTuple):
    """Blocks of rows that read one chunk of the text.

    Attributes:
        rows: n blocks of b rows in each batch row.
        chunk: int64 [B,n], the chunk that a block reads.
        place: int64 [B,n,b], where in the chunk the anchor of a row is.
    """

    rows: Rows
    chunk: Tensor
    place: Tensor


def _blocks(layout: ThoughtLayout) -> Blocks:
    return blocks_of(layout.row_anchor(), layout.branches.live(), layout.L, layout.P)


def blocks_of(anchor: Tensor, live: Tensor, L: int, most: int) -> Blocks:
    """For rows [B,R] of ascending anchors, of which there are at most ``most``. A row that is off goes with the one before it.

    Made without a look at values, so there are as many blocks as any anchors could need.
    """
    B, R = anchor.shape
    device = anchor.device
    chunks = -(-L // CHUNK)
    b = BLOCK
    while b > 16 and b * chunks > 2 * R:
        b //= 2
    anchor = anchor.where(live, 0).cummax(1).values
    chunk = anchor // CHUNK
    first = torch.searchsorted(chunk, torch.arange(chunks + 1, device=device).expand(B, -1).contiguous())
    needed = (first.diff(dim=1) + b - 1) // b  # blocks of each chunk
    end = needed.cumsum(1)
    base = end - needed
    n = int(end[:, -1].max()) if B and known(end) else R // b + min(chunks, most + 1, R)
    slot = base.gather(1, chunk) * b + torch.arange(R, device=device) - first.gather(1, chunk)
    block = torch.arange(n, device=device).expand(B, n).contiguous()
    of_block = torch.searchsorted(end, block, right=True).clamp(max=chunks - 1)
    row = first.gather(1, of_block) + (block - base.gather(1, of_block)) * b
    row = row[..., None] + torch.arange(b, device=device)
    row = row.where(row < first.gather(1, of_block + 1)[..., None], -1)
    place = (anchor % CHUNK).gather(1, row.clamp(min=0).flatten(1)).view_as(row)
    batch = torch.arange(B, device=device)[:, None]
    return Blocks(Rows(batch.expand(B, n), row, slot + batch * n * b), of_block, place)


def read(xs: Sequence[Tensor], blocks: Blocks, past: Chunks, clean: bool = False) -> list[Tensor]:
    """What each row of xs [B,G,n,b,K] reads of the state at its anchor, [B,H,n,b,E]. ``clean``: NaN of the text counts as 0."""
    B, n = blocks.chunk.shape
    batch = torch.arange(B, device=blocks.chunk.device)[:, None, None]

    def of_chunk(x: Tensor) -> Tensor:
        x = _at_chunk(x, batch, blocks.chunk[:, None])
        return finite(x) if clean and x.is_floating_point() else x

    def of_row(x: Tensor) -> Tensor:
        block = torch.arange(B * x.shape[1] * n, device=batch.device).view(B, x.shape[1], n, 1)
        return _take(x.flatten(0, 3), block * CHUNK + blocks.place[:, None])

    k, w, g, seen, S = (of_chunk(x) for x in past)
    decay = _decay(g, seen)
    start, decay = of_row(_start(g, seen, decay)), None if decay is None else of_row(decay)
    scores = _scores(xs, k, g, seen, decay, of_row)
    return [_plus(_read(x, S, start), y, w) for x, y in zip(xs, scores, strict=True)]


def _branch_rows(layout: ThoughtLayout) -> Rows:
    """A block for each branch of a packed layout."""
    B, C, S, device = layout.B, layout.P, layout.S, layout.device
    start, length = layout.branches.table[..., START, None].long(), layout.branches.table[..., LENGTH, None]
    s = torch.arange(S, device=device)
    row = (start + s).where(s < length, -1)
    batch = torch.arange(B, device=device)[:, None]
    slot = (batch * C + layout.branches.of_row) * S + layout.row_in_branch()
    return Rows(batch.expand(B, C), row, slot.where(layout.branches.live(), -1))


class Plan(NamedTuple):
    """Chunks of branch rows, level after level.

    Attributes:
        rows: N chunks of CHUNK rows, or of another size.
        sizes: how many chunks each level has.
        above: of each level but the first: int64, the place of each chunk's parent in the level before.
        batch, anchor: int64 [A], anchors that differ, and in which batch row.
        first: int64, for each chunk of the first level, which of these it follows.
    """

    rows: Rows
    sizes: list[int]
    above: list[Tensor]
    batch: Tensor
    anchor: Tensor
    first: Tensor


def plan_of(layout: ThoughtLayout, size: int = CHUNK) -> Plan:
    """Raises ValueError for a layout without values."""
    if torch.compiler.is_compiling():  # a decorator would import Dynamo, and with it Triton
        return torch.compiler.disable(_make_plan)(layout, size)
    return _make_plan(layout, size)


def _make_plan(layout: ThoughtLayout, size: int) -> Plan:
    if not has_values(layout.lo):
        raise ValueError("thought_delta: a tree must have values, got a meta, fake or traced layout")
    B, L, R, branches = layout.B, layout.L, layout.R, layout.branches
    anchor, start, length = branches.table.cpu().long().flatten(0, 1).unbind(1)
    # Chunks in the order of their branches.
    counts = (length + size - 1) // size
    branch = torch.arange(len(counts)).repeat_interleave(counts)
    batch = branch // max(branches.C, 1)
    first = start[branch] + (torch.arange(len(branch)) - (counts.cumsum(0) - counts)[branch]) * size
    row = first[:, None] + torch.arange(size)
    on = row < (start + length)[branch, None]
    number, slot = torch.arange(row.numel()).view_as(row), torch.full((B, R), -1)
    slot[batch[:, None].expand_as(row)[on], row[on]] = number[on]
    # The chunk above is that of the row before the first; it stands before.
    before = branches.parent_rows().cpu()[batch, L + first] - L
    above = torch.where(before < 0, -1, slot[batch, before.clamp(min=0)] // size)
    levels: list[int] = []
    for chunk in above.tolist():
        levels.append(0 if chunk < 0 else levels[chunk] + 1)
    level = torch.tensor(levels, dtype=torch.int64)
    order, sizes = level.argsort(stable=True), level.bincount().tolist()
    branch, batch, row, on, above = (x[order] for x in (branch, batch, row, on, order.argsort()[above]))
    slot[batch[:, None].expand_as(row)[on], row[on]] = number[on]
    parents = [x - begin for x, begin in zip(above.split(sizes)[1:], [0, *itertools.accumulate(sizes)], strict=False)]
    roots = branch[: sum(sizes[:1])]
    keys, first = (roots // max(branches.C, 1) * L + anchor[roots]).unique(return_inverse=True)
    rows = Rows(*(x.to(layout.device) for x in (batch[:, None], row.where(on, -1)[:, None], slot)))
    of_level = [x.to(layout.device) for x in (keys // max(L, 1), keys % max(L, 1), first, *parents)]
    return Plan(rows, sizes, of_level[3:], *of_level[:3])


def _by_states(
    layout: ThoughtLayout, past: Chunks, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, sizes, above, batch, anchor, first = layout.table("delta plan", plan_of)
    if not sizes:
        return v * 0, v * 0
    q, k, v, g = (rows.split(x) for x in (q, k, v, g))
    beta = None if beta is None else rows.split(beta)
    S = _take(state_at(past, batch, anchor), first)[:, :, None]
    out, w, _ = _recur(S, lambda x: x.split(sizes), torch.cat, above, _causal(CHUNK, g.device), q, k, v, g, beta)
    return rows.joined(out), rows.joined(w)  # type: ignore[arg-type]  # there is a q


def state_at(past: Chunks, batch: Tensor, position: Tensor) -> Tensor:
    """The states [A,H,K,E] after text rows ``position`` [A] of batch rows ``batch`` [A]."""
    chunk, place = position // CHUNK, position % CHUNK

    k, w, g, seen, S = (_at_chunk(x, batch[:, None], chunk[:, None]) for x in past)
    seen = seen[torch.arange(len(place), device=place.device), :, place][..., None]  # [A,1,1+CHUNK,1]
    g = g.where((torch.arange(CHUNK, device=g.device) <= place[:, None])[:, None, :, None], 0)
    carry = (g.sum(-2).exp() * seen[:, :, 0])[..., None]
    return S * carry + (spread(k, w.shape[1]) * (_after(g).exp() * seen[:, :, 1:])).mT @ w


def read_rows(x: Tensor, g: Tensor, text: tuple, states: Tensor, own: tuple, seen: Tensor, layout: ThoughtLayout) -> Tensor:
    """What x [B,G,C,n,K] reads of the state before a row of each branch, after its decay g [B,H,C,1 or K]: [B,H,C,n,E].

    Args:
        text: k, w and g of the text's rows, not all finite.
        states: [B,H,chunks,K,E], at the start of each chunk.
        own: k [B,G,C,S,K], w [B,H,C,S,E] and g [B,H,C,S,1 or K] of the rows above on the branch's path.
        seen: bool [B,C,S], which of these count.
    """
    H, channels = g.shape[1], g.shape[-1] > 1
    k, w, decay = own
    if channels:
        x, k = spread(x, H), spread(k, H)
    _, past = text_chunks(masks_of(layout), states, *text)
    decay = decay.where(seen[:, None, ..., None], 0)
    left = (decay.sum(3) + g).exp()
    decay = (_after(decay) + g[:, :, :, None]).exp() * seen[:, None, ..., None]
    scores = x @ (k * decay).mT if channels else spread(x @ k.mT, H) * decay.mT
    if not layout.L:
        return scores @ w
    blocks = layout.table("delta decode blocks", _decode_blocks)
    reads = read([blocks.rows.split(y * left if channels else y) for y in x.unbind(3)], blocks, past, clean=True)
    reads = [blocks.rows.joined(y) * (1 if channels else left) for y in reads]
    return _plus(torch.stack(reads, 3), scores, w)


def _decode_blocks(layout: ThoughtLayout) -> Blocks:
    anchor = layout.branches.table[..., ANCHOR].long()
    return blocks_of(anchor, anchor >= 0, layout.L, layout.P)
