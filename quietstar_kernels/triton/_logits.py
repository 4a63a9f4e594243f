"""The kernels between the matrix products of linear_logprob: from logits to the states of their rows, and to gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from quietstar_kernels.triton._math import tanh

LOWEST = tl.constexpr(-1e30)  # the logit of an id that doesn't count
TINY = tl.constexpr(1e-38)  # the smallest probability whose log is taken


@triton.jit
def _final(x, shift, inner, outer):
    """The final logit of product x, divided by the temperature, and its derivative by x. LOWEST for ids that don't count."""
    logit = (x + shift) * inner
    slope = inner
    if outer is not None:
        bend = tanh(logit)
        logit = outer * bend
        slope = outer * inner * (1 - bend * bend)
    return tl.where(shift == float("-inf"), LOWEST, logit), slope


@triton.jit(do_not_specialize=["rows", "stride_tops"], do_not_specialize_on_alignment=["tops"])
def _online_softmax(
    x,
    shift,
    targets,
    largest,
    total,
    weighted,
    picked,
    kept,
    tops,
    first,
    rows,
    width,
    stride_x,
    stride_kept,
    stride_tops,
    inner,
    outer,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds ids first..first+width-1, with logits x [rows,width], to the states of the rows.

    largest: of the logits so far; total: sum of exp(logit - largest); weighted: of that times (logit - largest), or None;
    picked: the target's logit, written in the chunk that holds it. With kept, exp(logit - top) go there, and the tops, each of
    BLOCK_V ids, into tops.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    row = x + r.to(tl.int64) * stride_x
    m = tl.load(largest + r, mask=inside, other=0.0)
    s = tl.load(total + r, mask=inside, other=1.0)
    w = s
    if weighted is not None:
        w = tl.load(weighted + r, mask=inside, other=0.0)

    for start in range(0, width, BLOCK_V):
        c = start + tl.arange(0, BLOCK_V)
        within = c < width
        shift_c = tl.load(shift + c, mask=within, other=float("-inf"))
        x_c = tl.load(row[:, None] + c[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        logit, _ = _final(x_c, shift_c[None, :], inner, outer)
        new = tl.maximum(m, tl.max(logit, 1))
        gap = logit - new[:, None]
        p = tl.exp(gap)
        decay = tl.exp(m - new)
        if weighted is not None:
            w = decay * (w + s * (m - new)) + tl.sum(p * gap, 1)
        s = decay * s + tl.sum(p, 1)
        m = new
        if kept is not None:
            to = kept + r.to(tl.int64)[:, None] * stride_kept + c[None, :]
            tl.store(to, p.to(kept.dtype.element_ty), mask=inside[:, None] & within[None, :])
            tl.store(tops + r * stride_tops + start // BLOCK_V, new, mask=inside)

    c = tl.load(targets + r, mask=inside, other=-1) - first
    here = inside & (c >= 0) & (c < width)
    logit, _ = _final(tl.load(row + c, mask=here, other=0.0), tl.load(shift + c, mask=here, other=0.0), inner, outer)
    tl.store(largest + r, m, mask=inside)
    tl.store(total + r, s, mask=inside)
    if weighted is not None:
        tl.store(weighted + r, w, mask=inside)
    tl.store(picked + r, tl.where(logit == LOWEST, float("-inf"), logit), mask=here)


@triton.jit(do_not_specialize=["rows", "stride_rows"])
def _logits_gradient(
    x,
    shift,
    targets,
    entropy,
    largest,
    log_total,
    kept_rows,
    grad_logprob,
    grad_entropy,
    d,
    first,
    rows,
    width,
    stride_x,
    stride_rows,
    stride_d,
    inner,
    outer,
    SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """d [rows,width]: the gradient of the loss by hidden · weight, for ids first..first+width-1. x is that product or, with
    kept_rows, what the forward kept of it.
    """
    tl.static_assert(SPAN % BLOCK_V == 0)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, within = r < rows, c < width
    both = inside[:, None] & within[None, :]
    target = c[None, :] == (tl.load(targets + r, mask=inside, other=-1) - first)[:, None]
    g = tl.load(grad_logprob + r, mask=inside, other=0.0)[:, None]
    largest_r = tl.load(largest + r, mask=inside, other=0.0)[:, None]
    log_total_r = tl.load(log_total + r, mask=inside, other=0.0)[:, None]
    shift_c = tl.load(shift + c, mask=within, other=float("-inf"))[None, :]
    x_rc = tl.load(x + r.to(tl.int64)[:, None] * stride_x + c[None, :], mask=both, other=0.0)

    if kept_rows is None:
        logit, slope = _final(x_rc, shift_c, inner, outer)
        logp = logit - largest_r - log_total_r
        p = tl.exp(logp)
    else:
        row = kept_rows + r * stride_rows
        picked = tl.load(row, mask=inside, other=0.0)[:, None]
        share = tl.load(row + 1 + (first + tl.program_id(1) * BLOCK_V) // SPAN, mask=inside, other=0.0)[:, None]
        p = tl.where(target, tl.exp(picked), x_rc.to(tl.float32) * share)
        logp = tl.where(target, picked, tl.log(tl.maximum(p, TINY)))  # the compiler drops it if nothing needs it
        slope = inner
        if outer is not None:
            bend = (logp + largest_r + log_total_r) * (1 / outer)
            slope = outer * inner * (1 - bend * bend)
    grad = tl.where(target, g, 0.0) - g * p
    if grad_entropy is not None:
        entropy_r = tl.load(entropy + r, mask=inside, other=0.0)[:, None]
        grad -= tl.load(grad_entropy + r, mask=inside, other=0.0)[:, None] * p * (logp + entropy_r)
    grad = tl.where(shift_c == float("-inf"), 0.0, grad * slope)

    tl.store(d + r.to(tl.int64)[:, None] * stride_d + c[None, :], grad.to(d.dtype.element_ty), mask=both)
