"""linear_logprob on GPUs: matrix products by the vendor's library, and one pass over the fp32 logits between them.

The forward takes one product and reads its logits once. The backward takes three and also reads them once: it has the LSE
from the forward, so that each logit gives its gradient directly. With D = 4096 a logit costs 4 * 2 * D operations on matrix
units, and 18 bytes of memory traffic, about a tenth of the time. A product of our own that keeps logits in registers would have
to come closer than that to the vendor's.

A forward that keeps its logits for the backward saves one of the four products. It keeps exp(logit - top), where top is the
largest logit so far in the row, in the model's dtype. The probability is then off by one rounding, as its gradient is anyway. A
rounded logit would make it off by the rounding of a number of the logit's size. The log-probability of the target stays fp32,
since the gradient of a row that is almost certain is a small difference from 1.

Logits exist for some ids and some rows at a time. The outer loop is over ids, since a weight usually has more rows than there
are hidden states: its gradient is then one product per chunk, and the gradient of the hidden states is summed in fp32. Memory
beyond the results: ``LOGITS`` logits, and in the backward that sum and ``COLUMNS`` numbers for each row, or ``LOGITS`` if more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._options import Head, Saved
from ._device import tanh
from .configs import LOGITS_GRADIENT, ONLINE_SOFTMAX, pick

LOGITS = 2**24  # of a chunk: 64 MB, or 512 output tiles of 128 x 256, several for each multiprocessor of any GPU
COLUMNS = 8192  # the least width of a chunk, which reads and writes the fp32 gradient of all hidden states
LOWEST = tl.constexpr(-1e30)  # the logit of an id that doesn't count
TINY = tl.constexpr(1e-38)  # the smallest probability whose log is taken
ALIGNED = 64  # ids: chunks start and end at multiples of this, so that all loads are wide


def empty_kept(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what a forward keeps: exp(logit - top) [R,V and padding], and fp32 [R,1+spans], the log-probability of the
    target and, for each span of ids, the factor that turns the first into probabilities.
    """
    R, V = hidden.shape[0], len(weight)  # len(hidden) would fix a symbolic R
    spans = triton.cdiv(V, _span(V))
    return hidden.new_empty(R, _aligned(V)), hidden.new_empty(R, 1 + spans, dtype=torch.float32)


def linear_logprob(
    hidden: Tensor, head: Head, targets: Tensor, return_entropy: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Implements ``reference.linear_logprob``."""
    weight = head.weight
    R, V = len(hidden), len(weight)
    shift, factors = _shift(head), head.factors
    targets = targets.contiguous()
    largest = shift.new_full((R,), LOWEST.value)
    total, picked = shift.new_zeros(R), shift.new_full((R,), math.nan)
    weighted = shift.new_zeros(R) if return_entropy else None
    kept, kept_rows = empty_kept(hidden, weight) if keep else (None, None)
    tops = None if kept_rows is None else kept_rows[:, 1:]
    config = pick(ONLINE_SOFTMAX, 4, V)
    height, width = _chunk(R, V)
    logits = shift.new_empty(height, width)
    for ids in _slices(V, width):
        for rows in _slices(R, height):
            x = product(hidden[rows], weight[ids].T, logits[: rows.stop - rows.start, : ids.stop - ids.start])
            _online_softmax[triton.cdiv(len(x), config.blocks["BLOCK_R"]),](
                x, shift[ids.start :], targets[rows], largest[rows], total[rows],
                None if weighted is None else weighted[rows], picked[rows],
                None if kept is None else kept[rows, ids.start :],
                None if tops is None else tops[rows, ids.start // _span(V) :],
                ids.start, len(x), _aligned(x.shape[1]), x.stride(0),
                0 if kept is None else kept.stride(0), 0 if tops is None else tops.stride(0),
                *factors, **config.options(),
            )  # fmt: skip
    log_total = total.log()
    picked.sub_(largest).sub_(log_total)
    logprob = torch.where(targets == -100, 0, picked)
    if kept_rows is not None and tops is not None:
        kept_rows[:, 0] = logprob
        tops.sub_(largest[:, None]).sub_(log_total[:, None]).exp_()
    entropy = torch.zeros_like(total) if weighted is None else log_total - weighted / total
    return logprob, entropy, largest, log_total, kept, kept_rows


def linear_logprob_backward(
    grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, head: Head, targets: Tensor, saved: Saved,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Implements ``reference.linear_logprob_backward``; a logit's gradient is rounded to the model's dtype for the products."""
    weight = head.weight
    R, V = len(hidden), len(weight)
    shift, factors = _shift(head), head.factors
    entropy, largest, log_total, kept, kept_rows = saved
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wanted[0] else None
    dweight = weight.new_empty(weight.shape) if wanted[1] else None
    dbias = weight.new_empty(V) if wanted[2] else None
    targets, grad_logprob = targets.contiguous(), torch.where(targets == -100, 0, grad_logprob)
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    config = pick(LOGITS_GRADIENT, 4, V)
    height, width = _chunk(R, V)
    logits = shift.new_empty(height, width) if kept is None else None
    dlogits = hidden.new_empty(R, width)
    for ids in _slices(V, width):
        d = dlogits[:, : ids.stop - ids.start]
        for rows in _slices(R, height):
            if logits is not None:
                x = product(hidden[rows], weight[ids].T, logits[: rows.stop - rows.start, : ids.stop - ids.start])
            elif kept is not None:
                x = kept[rows, ids]
            padded = _aligned(x.shape[1])
            _logits_gradient[triton.cdiv(len(x), config.blocks["BLOCK_R"]), triton.cdiv(padded, config.blocks["BLOCK_V"])](
                x, shift[ids.start :], targets[rows], entropy[rows], largest[rows], log_total[rows],
                None if kept_rows is None else kept_rows[rows], grad_logprob[rows],
                None if grad_entropy is None else grad_entropy[rows], d[rows],
                ids.start, len(x), padded, x.stride(0), 0 if kept_rows is None else kept_rows.stride(0), d.stride(0),
                *factors, SPAN=_span(V), **config.options(),
            )  # fmt: skip
        if dhidden is not None:
            add_product(dhidden, d, weight[ids])
        if dweight is not None:
            product(d.T, hidden, dweight[ids])
        if dbias is not None:
            dbias[ids] = d.sum(0, dtype=torch.float32)
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight, dbias


def _shift(head: Head) -> Tensor:
    """What is added to each logit, fp32 [V] and padding: the bias, and -inf for ids that don't count."""
    V = len(head.weight)
    shift = head.weight.new_full((_aligned(V),), -math.inf, dtype=torch.float32)
    shift[:V] = 0 if head.bias is None else head.bias
    for token in head.banned:
        shift[token : token + 1].fill_(-math.inf)
    return shift


def _chunk(R: int, V: int) -> tuple[int, int]:
    """Rows and ids of a chunk, of whole spans. With few rows it is wide."""
    R, span = max(R, 1), _span(V)
    width = min(max(triton.cdiv(COLUMNS, span), LOGITS // R // span) * span, _aligned(V))
    return min(max(LOGITS // width // ALIGNED, 1) * ALIGNED, R), width


def _span(V: int) -> int:
    """Ids that ``_online_softmax`` processes at a time; they share one top."""
    return pick(ONLINE_SOFTMAX, 4, V).blocks["BLOCK_V"]


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _aligned(size: int) -> int:
    return triton.cdiv(size, ALIGNED) * ALIGNED


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b, in out's dtype, fp32 or that of the factors."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b, fp32."""
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.float(), b.float())


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
    x, shift, targets, largest, total, weighted, picked, kept, tops, first, rows, width,
    stride_x, stride_kept, stride_tops, inner, outer, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
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
    x, shift, targets, entropy, largest, log_total, kept_rows, grad_logprob, grad_entropy, d, first, rows, width,
    stride_x, stride_rows, stride_d, inner, outer, SPAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
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
