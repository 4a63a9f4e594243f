"""linear_logprob on GPUs: matrix products by the vendor's library, and one pass over the fp32 logits between them.

The forward is one product and one reading of its logits, the backward three and one: it has the LSE from the forward, so
that a logit turns into its gradient at sight. With D = 4096 a logit costs 4 * 2 * D operations on matrix units and 18 bytes
of memory besides, about a tenth of the time; a product of our own that keeps logits in registers would have to come closer
to the vendor's than that.

Logits exist for some ids and some rows at a time. Ids first, since a weight mostly has more rows than there are hidden
states: its gradient then comes out of one product per chunk, and what adds up in fp32 is the gradient of the hidden states.
Memory besides the results: that sum, ``COLUMNS`` numbers for each row, and ``LOGITS`` logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from quietstar_kernels.triton._math import tanh
from quietstar_kernels.triton._product import add_product, product
from quietstar_kernels.triton.configs import LOGITS_GRADIENT, ONLINE_SOFTMAX, pick

LOGITS = 2**24  # of a chunk: 64 MB, or 512 output tiles of 128 x 256, some for every multiprocessor of any GPU
COLUMNS = 8192  # least width of a chunk: each chunk reads and writes the fp32 gradient of all hidden states
ALIGNED = 64  # ids: chunks start and end at multiples of this, so that all loads are wide
LOWEST = tl.constexpr(-1e30)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: list[int],
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.linear_logprob``."""
    R, V = len(hidden), len(weight)
    shift, factors = _shift(weight, bias, banned), _factors(scale, softcap, temperature)
    targets = targets.contiguous()
    largest = shift.new_full((R,), LOWEST.value)
    total, picked = shift.new_zeros(R), shift.new_full((R,), math.nan)
    weighted = shift.new_zeros(R) if return_entropy else None
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
                ids.start,
                len(x),
                _aligned(x.shape[1]),
                x.stride(0),
                *factors,
                **config.options(),
            )
    log_total = total.log()
    logprob = torch.where(targets == -100, 0, picked - largest - log_total)
    entropy = torch.zeros_like(total) if weighted is None else log_total - weighted / total
    return logprob, entropy, largest, log_total


def linear_logprob_backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    largest: Tensor,
    log_total: Tensor,
    scale: float | None,
    softcap: float | None,
    temperature: float,
    banned: list[int],
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.linear_logprob_backward``; a logit's gradient is rounded to the model's dtype for the products."""
    R, V = len(hidden), len(weight)
    shift, factors = _shift(weight, bias, banned), _factors(scale, softcap, temperature)
    targets, grad_logprob = targets.contiguous(), torch.where(targets == -100, 0, grad_logprob)
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    dhidden = shift.new_zeros(hidden.shape) if wanted[0] else None
    dweight = weight.new_empty(weight.shape) if wanted[1] else None
    dbias = weight.new_empty(V) if wanted[2] else None
    config = pick(LOGITS_GRADIENT, 4, V)
    height, width = _chunk(R, V)
    logits, dlogits = shift.new_empty(height, width), hidden.new_empty(R, width)
    for ids in _slices(V, width):
        d = dlogits[:, : ids.stop - ids.start]
        for rows in _slices(R, height):
            x = product(hidden[rows], weight[ids].T, logits[: rows.stop - rows.start, : ids.stop - ids.start])
            padded = _aligned(x.shape[1])
            _logits_gradient[triton.cdiv(len(x), config.blocks["BLOCK_R"]), triton.cdiv(padded, config.blocks["BLOCK_V"])](
                x,
                shift[ids.start :],
                targets[rows],
                entropy[rows],
                largest[rows],
                log_total[rows],
                grad_logprob[rows],
                None if grad_entropy is None else grad_entropy[rows],
                d[rows],
                ids.start,
                len(x),
                padded,
                x.stride(0),
                d.stride(0),
                *factors,
                **config.options(),
            )
        if dhidden is not None:
            add_product(dhidden, d, weight[ids])
        if dweight is not None:
            product(d.T, hidden, dweight[ids])
        if dbias is not None:
            dbias[ids] = d.sum(0, dtype=torch.float32)
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight, dbias


def _shift(weight: Tensor, bias: Tensor | None, banned: list[int]) -> Tensor:
    """What is added to each logit, fp32 [V] and padding: the bias, -inf for ids that don't count."""
    V = len(weight)
    shift = weight.new_full((_aligned(V),), -math.inf, dtype=torch.float32)
    shift[:V] = 0 if bias is None else bias
    for token in banned:
        shift[token : token + 1].fill_(-math.inf)
    return shift


def _factors(scale: float | None, softcap: float | None, temperature: float) -> tuple[float, float | None]:
    """(inner, outer) of a final logit, outer * tanh(inner * x), or inner * x where outer is None."""
    scale = 1.0 if scale is None else scale
    return (scale / temperature, None) if softcap is None else (scale / softcap, softcap / temperature)


def _chunk(R: int, V: int) -> tuple[int, int]:
    """Rows and ids of a chunk; few rows make it wide."""
    R = max(R, 1)
    width = min(max(COLUMNS, LOGITS // R // ALIGNED * ALIGNED), _aligned(V))
    return min(max(LOGITS // width // ALIGNED, 1) * ALIGNED, R), width


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _aligned(size: int) -> int:
    return triton.cdiv(size, ALIGNED) * ALIGNED


@triton.jit
def _final(x, shift, inner, outer):
    """The final logit, over the temperature, of the product x; and its derivative by x. LOWEST for an id that doesn't count."""
    logit = (x + shift) * inner
    slope = inner
    if outer is not None:
        bend = tanh(logit)
        logit = outer * bend
        slope = outer * inner * (1 - bend * bend)
    return tl.where(shift == float("-inf"), LOWEST, logit), slope


@triton.jit(do_not_specialize=["rows"])
def _online_softmax(
    x,
    shift,
    targets,
    largest,
    total,
    weighted,
    picked,
    first,
    rows,
    width,
    stride_x,
    inner,
    outer,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Takes ids first..first+width-1, logits x [rows,width], into the states of the rows.

    largest: of the logits so far; total: sum of exp(logit - largest); weighted: of that times (logit - largest), or None;
    picked: the target's logit, written in the chunk that holds it.
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

    c = tl.load(targets + r, mask=inside, other=-1) - first
    here = inside & (c >= 0) & (c < width)
    logit, _ = _final(tl.load(row + c, mask=here, other=0.0), tl.load(shift + c, mask=here, other=0.0), inner, outer)
    tl.store(largest + r, m, mask=inside)
    tl.store(total + r, s, mask=inside)
    if weighted is not None:
        tl.store(weighted + r, w, mask=inside)
    tl.store(picked + r, tl.where(logit == LOWEST, float("-inf"), logit), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _logits_gradient(
    x,
    shift,
    targets,
    entropy,
    largest,
    log_total,
    grad_logprob,
    grad_entropy,
    d,
    first,
    rows,
    width,
    stride_x,
    stride_d,
    inner,
    outer,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """d [rows,width]: the loss by hidden · weight, from the products x of ids first..first+width-1."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, within = r < rows, c < width
    both = inside[:, None] & within[None, :]
    target = tl.load(targets + r, mask=inside, other=-1) - first
    g = tl.load(grad_logprob + r, mask=inside, other=0.0)[:, None]
    largest_r = tl.load(largest + r, mask=inside, other=0.0)[:, None]
    log_total_r = tl.load(log_total + r, mask=inside, other=0.0)[:, None]
    shift_c = tl.load(shift + c, mask=within, other=float("-inf"))[None, :]
    x_rc = tl.load(x + r.to(tl.int64)[:, None] * stride_x + c[None, :], mask=both, other=0.0)

    logit, slope = _final(x_rc, shift_c, inner, outer)
    logp = logit - largest_r - log_total_r
    p = tl.exp(logp)
    grad = tl.where(c[None, :] == target[:, None], g, 0.0) - g * p
    if grad_entropy is not None:
        entropy_r = tl.load(entropy + r, mask=inside, other=0.0)[:, None]
        grad -= tl.load(grad_entropy + r, mask=inside, other=0.0)[:, None] * p * (logp + entropy_r)
    grad = tl.where(shift_c == float("-inf"), 0.0, grad * slope)

    tl.store(d + r.to(tl.int64)[:, None] * stride_d + c[None, :], grad.to(d.dtype.element_ty), mask=both)
