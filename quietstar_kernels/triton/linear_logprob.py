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
beyond the results: that sum, ``COLUMNS`` numbers for each row, and ``LOGITS`` logits. If the gradient is known in the forward,
forward and backward take turns over some rows that keep their logits, and the weight's gradient is summed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from quietstar_kernels._options import Head, Saved
from quietstar_kernels.triton._logits import LOWEST, _logits_gradient, _online_softmax
from quietstar_kernels.triton._product import add_product, product
from quietstar_kernels.triton.configs import LOGITS_GRADIENT, ONLINE_SOFTMAX, pick

LOGITS = 2**24  # of a chunk: 64 MB, or 512 output tiles of 128 x 256, several for each multiprocessor of any GPU
COLUMNS = 8192  # the least width of a chunk, which reads and writes the fp32 gradient of all hidden states
ALIGNED = 64  # ids: chunks start and end at multiples of this, so that all loads are wide

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


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
    """As ``reference.linear_logprob``."""
    weight = head.weight
    R, V = len(hidden), len(weight)
    shift, factors = _shift(head), _factors(head)
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
                x,
                shift[ids.start :],
                targets[rows],
                largest[rows],
                total[rows],
                None if weighted is None else weighted[rows],
                picked[rows],
                None if kept is None else kept[rows, ids.start :],
                None if tops is None else tops[rows, ids.start // _span(V) :],
                ids.start,
                len(x),
                _aligned(x.shape[1]),
                x.stride(0),
                0 if kept is None else kept.stride(0),
                0 if tops is None else tops.stride(0),
                *factors,
                **config.options(),
            )
    log_total = total.log()
    picked.sub_(largest).sub_(log_total)
    logprob = torch.where(targets == -100, 0, picked)
    if kept_rows is not None and tops is not None:
        kept_rows[:, 0] = logprob
        tops.sub_(largest[:, None]).sub_(log_total[:, None]).exp_()
    entropy = torch.zeros_like(total) if weighted is None else log_total - weighted / total
    return logprob, entropy, largest, log_total, kept, kept_rows


def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    """As ``reference.linear_logprob_backward``; a logit's gradient is rounded to the model's dtype for the products."""
    grads = _empty_gradients(hidden, head.weight, wanted, head.weight.dtype)
    final = _shift(head), _factors(head)
    _backward(grad_logprob, grad_entropy, hidden, head.weight, targets, saved, *final, grads, add=False)
    return _rounded(hidden, grads)


def linear_logprob_joined(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    wanted: list[bool],
    keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.linear_logprob_joined``, some rows at a time: those whose logits fit ``keep_bytes``, but at least D.

    With D rows, the products take over ten times as long as reading and writing the weight's gradient once more.
    """
    weight = head.weight
    (R, D), V = hidden.shape, len(weight)
    step = _aligned(max(D, keep_bytes // (_aligned(V) * hidden.element_size())))
    logprob, entropy = (hidden.new_empty(R, dtype=torch.float32) for _ in range(2))
    dhidden, dweight, dbias = grads = _empty_gradients(hidden, weight, wanted, torch.float32 if step < R else weight.dtype)
    final = _shift(head), _factors(head)
    for rows in _slices(max(R, 1), step):  # without rows the gradients are 0
        part, of_part = hidden[rows], (None if dhidden is None else dhidden[rows], dweight, dbias)
        logprob[rows], entropy[rows], largest, log_total, kept, kept_rows = linear_logprob(
            part, head, targets[rows], return_entropy=grad_entropy is not None, keep=True
        )
        saved = Saved(entropy[rows], largest, log_total, kept, kept_rows)
        incoming = grad_logprob[rows], None if grad_entropy is None else grad_entropy[rows]
        _backward(*incoming, part, weight, targets[rows], saved, *final, of_part, add=rows.start > 0)
        del saved, kept, kept_rows  # before the next rows keep theirs
    return logprob, entropy, *_rounded(hidden, grads)


def _empty_gradients(hidden: Tensor, weight: Tensor, wanted: list[bool], dtype: torch.dtype) -> Gradients:
    """For ``_backward``: that of hidden is 0; those of the weight, in ``dtype``, and of the bias are not yet written."""
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wanted[0] else None
    dweight = weight.new_empty(weight.shape, dtype=dtype) if wanted[1] else None
    return dhidden, dweight, weight.new_empty(len(weight), dtype=torch.float32) if wanted[2] else None


def _rounded(hidden: Tensor, grads: Gradients) -> Gradients:
    dhidden, dweight, dbias = (None if grad is None else grad.to(hidden.dtype) for grad in grads)
    return dhidden, dweight, dbias


def _backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    saved: Saved,
    shift: Tensor,
    factors: tuple[float, float | None],
    grads: Gradients,
    add: bool,
) -> None:
    """Adds to the gradient of hidden. Writes those of weight and bias or, with ``add``, adds to them; then they are fp32."""
    R, V = len(hidden), len(weight)
    entropy, largest, log_total, kept, kept_rows = saved
    dhidden, dweight, dbias = grads
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
                x,
                shift[ids.start :],
                targets[rows],
                entropy[rows],
                largest[rows],
                log_total[rows],
                None if kept_rows is None else kept_rows[rows],
                grad_logprob[rows],
                None if grad_entropy is None else grad_entropy[rows],
                d[rows],
                ids.start,
                len(x),
                padded,
                x.stride(0),
                0 if kept_rows is None else kept_rows.stride(0),
                d.stride(0),
                *factors,
                SPAN=_span(V),
                **config.options(),
            )
        if dhidden is not None:
            add_product(dhidden, d, weight[ids])
        if dweight is not None and add:
            add_product(dweight[ids], d.T, hidden)
        elif dweight is not None:
            product(d.T, hidden, dweight[ids])
        if dbias is not None:
            dbias[ids] = d.sum(0, dtype=torch.float32) + (dbias[ids] if add else 0)


def _shift(head: Head) -> Tensor:
    """What is added to each logit, fp32 [V] and padding: the bias, and -inf for ids that don't count."""
    V = len(head.weight)
    shift = head.weight.new_full((_aligned(V),), -math.inf, dtype=torch.float32)
    shift[:V] = 0 if head.bias is None else head.bias
    for token in head.banned:
        shift[token : token + 1].fill_(-math.inf)
    return shift


def _factors(head: Head) -> tuple[float, float | None]:
    """(inner, outer) of a final logit, outer * tanh(inner * x), or inner * x if outer is None."""
    scale = 1.0 if head.scale is None else head.scale
    if head.softcap is None:
        return scale / head.temperature, None
    return scale / head.softcap, head.softcap / head.temperature


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
