"""thought_delta_decode: one new row of every thought through a recurrent layer (no gradient).

A thought needs no state: it keeps what its rows left, as a key/value cache does, and reads the text's state at its anchor again
in each step. Few long branches are cheaper with a state each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .branches import ANCHOR, DEPTH, END, LENGTH, START
from .checks import FLOATS, INTEGERS
from .delta import CHUNK, matmul
from .delta.matmul import finite, known
from .layout import ThoughtLayout
from .thought_decode import check_parents
from .thought_delta import DeltaRows, check_arguments, check_recurrent, check_rows, columns, not_finite, widened

_OP = "thought_delta_decode"


@torch.no_grad()
def thought_delta_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    text: DeltaRows,
    states: Tensor,
    own: DeltaRows | Tensor,
    layout: ThoughtLayout,
    step: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Row ``step`` of all C = P*N branches at once, as ``thought_delta`` would compute it.

    NaN in a row of the text or of a branch makes the rows NaN that come after it on their paths, and no others.

    Args:
        q: [B,G,C,K], branch (p, n) of a grid at p*N + n.
        k, v, g, beta: [B,G,C,K], [B,H,C,E], [B,H,C] or [B,H,C,K], and [B,H,C] or None; as in ``thought_delta``.
        text: what the text's rows left.
        states: [B,H,n,K,E] from ``text_states``.
        own: what the branches' rows left, k [B,G,C,S,K], w [B,H,C,S,E], g [B,H,C,S] or [B,H,C,S,K]: rows before ``step`` must
            be written, and the others finite. In a ``tree`` it holds all rows of the nodes above, which are read too. Or the
            state of each branch, [B,H,C,K,E] from ``anchor_states``, which changes in place; not for trees.
        layout: which row follows which, as in ``thought_delta``.
        step: 0 to S-1; an int, or a 0-d int32 or int64 tensor on the same device.

    Returns:
        out [B,H,C,E] in v's dtype, and w [B,H,C,E]; both 0 where the row is off.

    Raises:
        ValueError: an argument with the wrong shape, dtype, device or range.
    """
    check = check_arguments(_OP, q, k, v, g, beta, layout, "P*N")
    layout.table("recurrent layout", lambda layout: check_recurrent(_OP, layout))
    device, H = layout.device, v.shape[1]
    check_rows(check, "text", text, "L", device)
    check.sizes["n"] = -(-layout.L // CHUNK)
    check.tensor("states", states, "B,H,n,K,E", FLOATS, device, "layout")
    if isinstance(own, Tensor):
        if layout.parent is not None:
            raise check.fail("own must be DeltaRows in a tree, got a state of each branch")
        check.tensor("own", own, "B,H,P*N,K,E", (torch.promote_types(v.dtype, torch.float32),), device, "layout")
        most = layout.S - 1
    else:
        if layout.packed_rows is None:
            check.sizes["S"] = layout.S
        check_rows(check, "own", own, "P*N,S", device)
        most = check["S"] - 1
        check_parents(check, "own", layout)
    if isinstance(step, Tensor):
        check.tensor("step", step, "", INTEGERS, device, "layout")
    if not isinstance(step, Tensor) or known(step):
        check.integer("step", int(step) if isinstance(step, Tensor) else step, 0, most, f"from 0 to S-1={most}")
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    on = (layout.branches.table[..., LENGTH] > step)[:, None, :, None]
    with torch.autocast(device.type, enabled=False):
        rows = [x.to(wide).where(on, 0) for x in (k, v, columns(g, v), *([] if beta is None else [beta[..., None]]))]
        q = q.to(wide).where(on, 0)
        bad, bad_q = not_finite(*rows, heads=H), not_finite(q, heads=H)
        q, k, v, g, *more = (finite(x) for x in (q, *rows))
        x = torch.stack([q, k], 3) if more else q[:, :, :, None]
        if isinstance(own, Tensor):
            own.mul_(g.exp()[..., None])
            found = matmul.spread(x, H) @ own
        else:
            kept, seen = _above(widened(own, wide), layout, step)
            found = matmul.read_rows(x, g, widened(text, wide), states.to(wide), kept, seen, layout)
            if layout.L:
                anchor = layout.branches.table[..., ANCHOR].long().clamp(min=0)
                last = text.w.gather(2, anchor[:, None, :, None].expand(-1, H, -1, v.shape[3]))
                bad = bad | ~last.sum(-1).isfinite()
        bad = bad | ~found[..., 0, :].sum(-1).isfinite()  # a row above is
        w = (v - found[..., 1, :]) * more[0] if more else v
        w = w.masked_fill(bad[..., None], torch.nan).where(on, 0)
        if isinstance(own, Tensor):
            own.addcmul_(matmul.spread(k, H)[..., None], w[..., None, :])
        out = found[..., 0, :] + matmul.spread((q * k).sum(-1, keepdim=True), H) * w
        out = out.masked_fill(bad_q[..., None], torch.nan).where(on, 0)
    return out.to(dtype), w


def _above(own: DeltaRows, layout: ThoughtLayout, step: int | Tensor) -> tuple[DeltaRows, Tensor]:
    """The rows on each branch's path, [B,*,C,rows,*], and bool [B,C,rows], which of them are before row ``step``."""
    S, tree = own.k.shape[3], layout.branches.tree
    if tree is None:
        return own, (torch.arange(S, device=layout.device) < step).expand(layout.B, layout.P * layout.N, S)
    slot = layout.table(f"delta paths of {S}", lambda layout: _path_slots(layout, tree, S))
    seen = (torch.arange(layout.S, device=layout.device) < tree[..., DEPTH, None] + step) & (slot >= 0)

    def on_path(x: Tensor) -> Tensor:
        index = slot.clamp(min=0).flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[4])
        return x.flatten(2, 3).gather(2, index).unflatten(2, slot.shape[1:]).where(seen[:, None, ..., None], 0)

    return DeltaRows(*(on_path(x) for x in own)), seen


def _path_slots(layout: ThoughtLayout, tree: Tensor, S: int) -> Tensor:
    """int64 [B,C,rows]: where each row on a node's path is among C * S rows, -1 after the end."""
    branches, most = layout.branches, layout.S
    start, end = branches.table[..., START, None], branches.per_row(tree[..., END])[:, None]
    r = torch.arange(layout.R, device=layout.device)
    node = branches.of_row[:, None]
    above = ((r < start) & (start < end) & (node >= 0)) | (node == torch.arange(layout.P, device=layout.device)[:, None])
    row = branches.row_in_branch()
    place = branches.row_in_path()[:, None].where(above & (row < S)[:, None], most)
    slot = (branches.of_row.long() * S + row)[:, None].expand_as(place)
    return slot.new_full((layout.B, layout.P, most + 1), -1).scatter_(2, place, slot)[..., :most]


@torch.no_grad()
def text_states(text: DeltaRows, lo: Tensor) -> Tensor:
    """The states [B,H,n,K,E] of a text before rows 0, 32, 64, .., from what its rows left. ``lo`` [B,L]: of its layout."""
    text = DeltaRows(*(finite(x) for x in widened(text, text.w.dtype)))
    return matmul.text_chunks(matmul.chunk_masks(lo), None, *text)[1].states


@torch.no_grad()
def anchor_states(text: DeltaRows, states: Tensor, layout: ThoughtLayout) -> Tensor:
    """The state [B,H,C,K,E] at each branch's anchor, from which ``thought_delta_decode`` goes on; 0 if unused.

    Args:
        text: what the text's rows left.
        states: from ``text_states``.
        layout: which text row each branch follows.
    """
    B, C, H = layout.B, layout.P * layout.N, text.w.shape[1]
    anchor = layout.branches.table[..., ANCHOR].long()
    if not layout.L:
        return text.w.new_zeros(B, H, C, text.k.shape[-1], text.w.shape[-1])
    last = anchor.clamp(min=0)
    bad = ~text.w.sum(-1).isfinite().gather(2, last[:, None].expand(B, H, C))
    rows = (finite(x) for x in widened(text, text.w.dtype))
    _, past = matmul.text_chunks(matmul.masks_of(layout), states, *rows)
    batch = torch.arange(B, device=anchor.device)[:, None].expand(B, C)
    found = matmul.state_at(past, batch.flatten(), last.flatten()).unflatten(0, (B, C)).transpose(1, 2)
    found = found.masked_fill(bad[..., None, None], torch.nan)
    return found.where((anchor >= 0)[:, None, :, None, None], 0).contiguous()


@torch.no_grad()
def advance_states(text: DeltaRows, states: Tensor, lo: Tensor, place: Tensor) -> None:
    """After row ``place`` of a growing text was written: writes the state before the next chunk into ``states``.

    Args:
        text: what the text's rows left, with room for L rows.
        states: [B,H,n,K,E] from ``text_states``.
        lo: int32 [B,L], the start of each row's document.
        place: int64 [1].
    """
    rows = place // CHUNK * CHUNK + torch.arange(CHUNK, device=place.device)
    k, w, g = (finite(x.index_select(2, rows.clamp(max=x.shape[2] - 1))) for x in widened(text, states.dtype))
    chunk = place // CHUNK
    seen = matmul.chunk_masks(lo).index_select(2, chunk)
    _, past = matmul.text_chunks(seen, states.index_select(2, chunk), k, w, g)
    batch = torch.arange(len(lo), device=lo.device)
    found = matmul.state_at(past, batch, (place % CHUNK).expand(len(lo)))[:, :, None]
    following = (chunk + 1).clamp(max=states.shape[2] - 1)
    states.index_copy_(2, following, found.where(chunk + 1 == following, states.index_select(2, following)))
