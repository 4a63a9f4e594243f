"""thought_conv: the short causal convolutions of hybrid models over packed text and thought rows, and a decoding step.

A row takes itself and the W-1 rows before it on its path, each channel by itself: the depthwise ``conv1d`` of Mamba
(arXiv 2312.00752, section 3.4), in which the first rows of a thought go on from the text at its anchor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    above = layout.table(f"{_OP} {taps} {given}", partial(_places, taps=taps, given=given))
    return call(_forward, x, weight, bias, text, above)


def conv_tails(x: Tensor, layout: ThoughtLayout, width: int) -> Tensor:
    """What a convolution of this width W takes for the first row of each branch, from the W-1 rows before it: [B,C,W-1,D].

    Args:
        x: the text's rows [B,L,D]; for a tree, all rows [B,M,D]. The rows before a document's first are 0.
        layout: as in ``thought_conv``.
        width: W.
    """
    before = layout.table(f"tails {width}", partial(_tails, width=width))
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


def _above(layout: ThoughtLayout, taps: int) -> Tensor:
    """int64 [W,B,M]: the row 0 to W-1 before each row on its path, -1 for none and where it is off."""
    check_recurrent(_OP, layout)
    parent = layout.branches.parent_rows()
    row = torch.arange(layout.M, device=layout.device).expand_as(parent)
    above = [row.where(pad(layout.branches.live(), (layout.L, 0), value=True), -1)]
    for _ in range(taps - 1):
        above.append(parent.gather(1, above[-1].clamp(min=0)).where(above[-1] >= 0, -1))
    return torch.stack(above)


def _tails(layout: ThoughtLayout, width: int) -> Tensor:
    """int64 [B,C,W-1]: the rows before the first of each branch, -1 for none."""
    start, length = (layout.branches.table[..., column].long() for column in (START, LENGTH))
    tails = pad(_above(layout, width)[1:], (0, 1)).gather(2, (layout.L + start).expand(width - 1, -1, -1))
    return tails.where(length > 0, -1).flip(0).permute(1, 2, 0)


def _places(layout: ThoughtLayout, taps: int, given: bool) -> Tensor:
    """int64 [W,B*n], ``_above`` for the rows of x, among all B*M rows."""
    above, first = _above(layout, taps), layout.M * torch.arange(layout.B, device=layout.device)[:, None]
    return (above + first).where(above >= 0, -1)[:, :, layout.L if given else 0 :].flatten(1)


def _source(x: Tensor, text: Tensor | None) -> Tensor:
    """[B*M,D]: all rows."""
    return (x if text is None else torch.cat([text, x], 1)).flatten(0, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x [rows,D] of these numbers, wide; 0 for -1."""
    return wide(x.index_select(0, index.clamp(min=0))).masked_fill_((index < 0)[:, None], 0)


def _by_place(weight: Tensor) -> Tensor:
    """[W,D], wide: what the row 0 to W-1 before a row is multiplied by."""
    return wide(weight).flip(1).T.contiguous()


def _blocks(rows: int, like: Tensor) -> list[slice]:
    size = max(_BLOCK.get(like.device.type, _LARGE_BLOCK) // max(like.shape[-1], 1), 1)
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


def _thought_conv(x: Tensor, weight: Tensor, bias: Tensor | None, text: Tensor | None, above: Tensor) -> Tensor:
    source, by_place, out = _source(x, text), _by_place(weight), x.new_empty(x.shape)
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
    grad: Tensor, x: Tensor, weight: Tensor, text: Tensor | None, above: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and text, the last with no rows if there is none."""
    source, g, by_place = _source(x, text), grad.flatten(0, 1), _by_place(weight)
    total = by_place.new_zeros(len(source) + 1, x.shape[2])  # and one for what no row gets
    grad_weight, grad_bias = torch.zeros_like(by_place), by_place.new_zeros(x.shape[-1])
    on = above[0] >= 0
    # Rows that are off add zeros, not all to one row, which would take long on a GPU.
    to = above.where(above >= 0, len(source)).where(on, torch.arange(len(g), device=x.device))
    for block in _blocks(len(g), x):
        later = wide(g[block]).where(on[block, None], 0)
        for i, taken in enumerate(by_place):
            total.index_put_((to[i, block],), later * taken, accumulate=True)  # in a fixed order, on GPUs too
            if needs_weight:
                grad_weight[i] += _rows(source, above[i, block]).mul_(later).sum(0)
        grad_bias += later.sum(0)
    sizes = [0 if text is None else text.shape[1], x.shape[1]]
    grads = total[:-1].view(len(x), sum(sizes), x.shape[2]).to(x.dtype)
    grad_text, grad_x = (y.contiguous() for y in grads.split(sizes, 1))
    return grad_x, grad_weight.flip(0).T.to(x.dtype).contiguous(), grad_bias.to(x.dtype), grad_text


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, text: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_text = len(x), 0 if text is None else text.shape[1], x.shape[2]
    dx, dweight, dbias, dtext = (x.new_empty(shape) for shape in (x.shape, weight.shape, weight.shape[:1], of_text))
    return dx, dweight, dbias, dtext


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, text, above = inputs
    ctx.save_for_backward(x, weight, text, above)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    x, weight, text, above = ctx.saved_tensors
    grads = call(_backward, grad, x, weight, text, above, ctx.needs_input_grad[1])
    return *(y if needed else None for y, needed in zip(grads, ctx.needs_input_grad, strict=False)), None


_backward = operator(_thought_conv_backward, _fake_backward, instead="conv1d has one")
_forward = operator(_thought_conv, _fake, _setup_context, _autograd, instead="conv1d has one")
