"""thought_conv: the short causal convolutions of hybrid models over packed text and thought rows, and a decoding step.

A row takes itself and the W-1 rows before it on its path, each channel by itself: the depthwise ``conv1d`` of Mamba
(arXiv 2312.00752, section 3.4), in which the first rows of a thought go on from the text at its anchor.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._operator import call, operator
from .branches import LENGTH, START
from .checks import FLOATS, Checker, check_instance, under_autocast
from .layout import ThoughtLayout
from .reference import wide
from .thought_delta import check_recurrent

_OP = "thought_conv"
_BLOCK = {"cpu": 2**17}  # numbers of a tensor at a time, such as stay in a core's cache
_LARGE_BLOCK = 2**24


def thought_conv(x: Tensor, weight: Tensor, bias: Tensor | None, layout: ThoughtLayout, text: Tensor | None = None) -> Tensor:
    """The convolution along the path of each row, which begins at zero where a document does.

    Differentiable in x, text, weight and bias; it keeps its inputs for that, and no copies of them. Deterministic: two runs on
    one machine agree bitwise. Sums are fp32 (fp64 for fp64 inputs). NaN in a row reaches that row and the W-1 after it on its
    paths, no others, and in no row's gradient.

    Args:
        x: [B,M,D], or [B,R,D] with ``text``; fp32, fp16, bf16 or fp64.
        weight: [D,W], whose last column is for the row itself. Under autocast several dtypes are cast to its dtype.
        bias: [D].
        layout: which row follows which; ``own="full"`` is refused, and so is an ``lo`` that is not the start of a document.
        text: [B,L,D], the text's rows of x, from an earlier call; x then holds the R thought rows alone.

    Returns:
        [B,rows,D] in x's dtype; 0 where a row is off.

    Raises:
        ValueError: an argument with the wrong shape, dtype or device, or a layout that is refused.
    """
    check_instance(_OP, "layout", layout, ThoughtLayout)
    x, weight, bias, text = under_autocast(x, weight, bias, text)
    check = Checker(_OP, B=layout.B, M=layout.M, R=layout.R, L=layout.L)
    check.tensor("x", x, "B,M,D" if text is None else "B,R,D", FLOATS, layout.device, "layout")
    _check_others(check, x, weight, bias, text)
    given, taps = text is not None, check["W"]
    table = layout.table(f"{_OP} {taps} {given}", partial(_table, taps=taps, given=given))
    return call(_forward, x, weight, bias, text, *table)


def conv_tails(x: Tensor, layout: ThoughtLayout, width: int) -> Tensor:
    """What a convolution of this width W takes for the first row of each branch, from the W-1 rows before it: [B,C,W-1,D].

    Args:
        x: the text's rows [B,L,D]; for a tree, all rows [B,M,D]. The rows before a document's first are 0.
        layout: as in ``thought_conv``.
        width: W.
    """
    before = layout.table(f"tails {width}", lambda layout: _paths(layout, width)[1].flip(2))
    row = pad(x, (0, 0, 0, 1)).gather(1, before.clamp(min=0).flatten(1)[..., None].expand(-1, -1, x.shape[2]))
    return row.view(*before.shape, x.shape[2]).where((before >= 0)[..., None], 0)


def thought_conv_decode(x: Tensor, tails: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The next row of all branches, as ``thought_conv`` would compute it; no gradient.

    Args:
        x: [B,C,D].
        tails: [B,C,W-1,D], the rows before it, from ``conv_tails`` or the step before; changed to those before the next one.
        weight, bias: as in ``thought_conv``.

    Returns:
        [B,C,D] in x's dtype.

    Raises:
        ValueError: an argument with the wrong shape, dtype or device.
    """
    check = Checker("thought_conv_decode")
    check.tensor("x", x, "B,C,D", FLOATS)
    _check_others(check, x, weight, bias, None)
    check.sizes["W-1"] = check["W"] - 1
    check.tensor("tails", tails, "B,C,W-1,D", (x.dtype,), x.device, "x")
    by_place = _by_place(weight)
    total = wide(x) * by_place[0]
    for taken, row in zip(by_place[1:], tails.flip(2).unbind(2), strict=True):
        total.addcmul_(wide(row), taken)
    tails.copy_(torch.cat([tails, x[:, :, None]], 2)[:, :, 1:])
    return (total if bias is None else total + bias).to(x.dtype)


def _check_others(check: Checker, x: Tensor, weight: Tensor, bias: Tensor | None, text: Tensor | None) -> None:
    for name, value, letters in (("weight", weight, "D,W"), ("bias", bias, "D"), ("text", text, "B,L,D")):
        if name == "weight" or value is not None:
            check.tensor(name, value, letters, (x.dtype,), x.device, "x")
    if not check["W"]:
        raise check.fail("weight must have at least one column, got W=0")


class _Table(NamedTuple):
    """Numbers of rows, all of the batch in one dimension: B*M of x with the text, B*n of x itself.

    Attributes:
        above: int64 [W,B*n], in x with the text: the row 0 to W-1 before each row on its path, -1 for none.
        below: bool [W,B*n]: whether the row 0 to W-1 places on is in the same branch, or document of the text.
        heads: int64 [B*C,W-1], in x: the first rows of each branch, -1 for none.
        tails: int64 [B*C,W-1], in x with the text: the rows 1 to W-1 before its first, -1 for none.
    """

    above: Tensor
    below: Tensor
    heads: Tensor
    tails: Tensor


def _paths(layout: ThoughtLayout, taps: int) -> tuple[Tensor, Tensor]:
    """int64 [W,B,M], the row 0 to W-1 before each row, -1 for none and where it is off; [B,C,W-1], those before branches."""
    check_recurrent(_OP, layout)
    branches, parent, M = layout.branches, layout.branches.parent_rows(), layout.M
    row = torch.arange(M, device=layout.device).expand_as(parent)
    above = [row.where(pad(branches.live(), (layout.L, 0), value=True), -1)]
    for _ in range(taps - 1):
        above.append(parent.gather(1, above[-1].clamp(min=0)).where(above[-1] >= 0, -1))
    paths = torch.stack(above)
    first = (layout.L + branches.table[..., START].long()).expand(taps - 1, -1, -1)
    tails = pad(paths[1:], (0, 1)).gather(2, first).where(branches.table[..., LENGTH] > 0, -1)
    return paths, tails.permute(1, 2, 0)


def _table(layout: ThoughtLayout, taps: int, given: bool) -> _Table:
    above, tails = _paths(layout, taps)
    branches, B, M, skip = layout.branches, layout.B, layout.M, layout.L if given else 0
    place = torch.cat([branches.text_position_ids(), branches.row_in_branch()], 1)  # in the document, or branch
    below = torch.stack([pad(place, (0, i), value=-1)[:, i:] >= i for i in range(taps)])
    batch = torch.arange(B, device=layout.device)[:, None]
    start, length = (branches.table[..., column].long()[..., None] for column in (START, LENGTH))
    s = torch.arange(taps - 1, device=layout.device)
    heads = (layout.L - skip + start + s + (batch * (M - skip))[..., None]).where(s < length, -1)
    above = (above + batch * M).where(above >= 0, -1)
    tails = (tails + (batch * M)[..., None]).where(tails >= 0, -1)
    return _Table(above[:, :, skip:].flatten(1), below[:, :, skip:].flatten(1), heads.flatten(0, 1), tails.flatten(0, 1))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x [rows,D] of these numbers, wide; 0 for -1."""
    return wide(x.index_select(0, index.clamp(min=0))).masked_fill_((index < 0)[:, None], 0)


def _by_place(weight: Tensor) -> Tensor:
    """[W,D], wide: what the row 0 to W-1 before a row is multiplied by."""
    return wide(weight).flip(1).T.contiguous()


def _blocks(rows: int, like: Tensor) -> list[slice]:
    size = max(_BLOCK.get(like.device.type, _LARGE_BLOCK) // max(like.shape[-1], 1), 1)
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


def _thought_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, text: Tensor | None,
    above: Tensor, below: Tensor, heads: Tensor, tails: Tensor,
) -> Tensor:  # fmt: skip
    source = (x if text is None else torch.cat([text, x], 1)).flatten(0, 1)
    by_place, out = _by_place(weight), x.new_empty(x.shape)
    rows, off = out.view(-1, x.shape[-1]), (above[0] < 0)[:, None]
    for block in _blocks(len(rows), x):
        total = _rows(source, above[0, block]).mul_(by_place[0])
        for row, taken in zip(above[1:, block], by_place[1:], strict=True):
            total.addcmul_(_rows(source, row), taken)
        if bias is not None:
            total.add_(bias).masked_fill_(off[block], 0)
        rows[block] = total
    return out


def _thought_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, text: Tensor | None,
    above: Tensor, below: Tensor, heads: Tensor, tails: Tensor, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and text, the last empty if there is none."""
    B, n, D = x.shape
    packed = x if text is None else torch.cat([text, x], 1)
    source, g, by_place = packed.flatten(0, 1), grad.flatten(0, 1), _by_place(weight)
    W, total = len(by_place), by_place.new_zeros(source.shape)
    grad_weight, grad_bias = torch.zeros_like(by_place), by_place.new_zeros(D)
    # What the first rows of branches took from the rows before them.
    spare = torch.arange(len(tails), device=x.device) % max(len(source), 1)
    for block in _blocks(len(tails) if W > 1 else 0, x):
        first = _rows(g, heads[block].flatten()).view(*heads[block].shape, D)
        for j in range(1, W):
            row = tails[block, j - 1]
            taken = first[:, 0] * by_place[j]
            for s in range(1, W - j):
                taken.addcmul_(first[:, s], by_place[s + j])
            taken.masked_fill_((row < 0)[:, None], 0)
            total.index_put_((row.where(row >= 0, spare[block]),), taken, accumulate=True)  # in a fixed order, on GPUs too
            if needs_weight:
                there = _rows(source, row)
                for s in range(W - j):
                    grad_weight[s + j] += (there * first[:, s]).sum(0)
    # And what rows took from those of the same branch, or document of the text.
    own = total if text is None else total.view(packed.shape)[:, -n:].flatten(0, 1)
    for block in _blocks(B * n, x):
        here = wide(x.flatten(0, 1)[block]).where(below[0, block, None], 0)
        for i in range(W):
            later = g[block.start + i : block.stop + i]
            rows = slice(block.start, block.start + len(later))
            later = wide(later).where(below[i, rows, None], 0)
            own[rows].addcmul_(later, by_place[i])
            if needs_weight:
                grad_weight[i] += (later * here[: len(later)]).sum(0)
            if i == 0:
                grad_bias += later.sum(0)
    grad_text = x.new_empty(0) if text is None else total.view(packed.shape)[:, : text.shape[1]].to(x.dtype).contiguous()
    grad_weight = grad_weight.flip(0).T.contiguous()
    return own.view(x.shape).to(x.dtype), grad_weight.to(x.dtype), grad_bias.to(x.dtype), grad_text


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, text: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dweight, dbias = (x.new_empty(shape) for shape in (x.shape, weight.shape, weight.shape[:1]))
    return dx, dweight, dbias, x.new_empty(0 if text is None else text.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *rest = inputs
    ctx.save_for_backward(x, weight, *rest)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    x, weight, text, *table = ctx.saved_tensors
    needs_weight = ctx.needs_input_grad[1]
    dx, dweight, dbias, dtext = call(_backward, grad, x, weight, text, *table, needs_weight)
    grads = dx, dweight, dbias, dtext
    return *(y if needed else None for y, needed in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 4


_backward = operator(_thought_conv_backward, _fake_backward, instead="conv1d has one")
_forward = operator(_thought_conv, _fake, _setup_context, _autograd, instead="conv1d has one")
