"""The specification: the ops in plain dense PyTorch, on any device, in fp64 too. All back ends are tested against it.

Shapes use the dimension key of the package. Attention computes in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._options import AttentionOptions, Head, Saved
from .branches import ANCHOR, END, LENGTH, START, Branches, of_rows
from .philox import draw_words

INFINITE = 1e30  # an LSE as large as this, in bits, counts as infinite: kernels begin with -1e30 as the largest logit
BLOCK = 128  # vocabulary ids in one block of the sampling race: part of the sampler's definition
GROUPS = 8  # the draw inside a block takes one of 8 groups of 16 columns first


def why_not(op: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """Implements ``_dispatch.why_not``: the reference serves everything."""
    return None


def wide(x: Tensor) -> Tensor:
    """fp64 stays as it is; everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def thought_attention(q: Tensor, k: Tensor, v: Tensor, branches: Branches, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T, masked) v over the packed rows. Returns out [B,H,rows,E] and lse [B,H,rows]."""
    mask, live = _masks(branches, options.window, q.shape[2])
    return _masked_attention(wide(q), wide(k), wide(v), mask, live, options, q.dtype)


def thought_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, branches: Branches,
    options: AttentionOptions, grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and sinks: dS = p * (dO v^T - rowsum(dO * O) + dlse), then through the soft cap and the scale."""
    scale, window, softcap, sinks = options
    mask, live = _masks(branches, window, q.shape[2])
    row_on = live[:, None, :, None]
    dO = wide(grad_out).masked_fill(~row_on, 0)
    H, G = q.shape[1], k.shape[1]
    key_on = branches.rows_on()[:, None, :, None]
    qf = wide(q).masked_fill(~row_on, 0)
    kf = wide(k).masked_fill(~key_on, 0).repeat_interleave(H // G, 1)
    vf = wide(v).masked_fill(~key_on, 0).repeat_interleave(H // G, 1)
    kf, vf, poisoned = _without_poison(kf, vf, mask)
    raw = scale * qf @ kf.transpose(-1, -2)
    scores = _softcap(raw, softcap).masked_fill(~mask[:, None], -math.inf)
    # A row that is off or sees a NaN has p = 0, so that it adds nothing to the gradients of its keys.
    safe_lse = torch.where(lse.isfinite(), lse, math.inf).to(scores.dtype)
    p = torch.exp(scores - safe_lse[..., None])
    delta = (dO * wide(out)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    delta = delta.masked_fill(poisoned | ~live[:, None], 0)
    ds = p * (dO @ vf.transpose(-1, -2) - delta[..., None])
    if softcap is not None:
        ds = ds * (1 - (torch.tanh(raw / softcap)) ** 2)
    ds = ds.masked_fill(~mask[:, None], 0)
    dq = (scale * ds @ kf).masked_fill(~row_on, 0).masked_fill(poisoned[..., None], math.nan)
    dk = _sum_groups(scale * ds.transpose(-1, -2) @ qf, G)
    dv = _sum_groups(p.transpose(-1, -2) @ dO, G)
    dsinks = None
    if sinks is not None:
        p_sink = torch.exp(wide(sinks)[None, :, None] - safe_lse).masked_fill(~live[:, None], 0)
        dsinks = -(p_sink * delta).sum((0, 2)).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def thought_decode(
    q: Tensor, k_text: Tensor, v_text: Tensor, k_own: Tensor, v_own: Tensor, lo: Tensor, table: Tensor, step: Tensor,
    options: AttentionOptions, tree: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Row ``step`` of every branch, q [B,H,C,K], over the text and its own rows 0..step. Returns [B,H,C,E].

    lo [B,L], table [B,C,3] and tree are those of ``Branches``; k_own [B,G,C,S,K]. In a tree it also sees the parents' rows.
    """
    mask, live = decode_mask(lo, table, tree, k_own.shape[3], step, options.window)
    keys = torch.cat([wide(k_text), wide(k_own).flatten(2, 3)], 2)
    values = torch.cat([wide(v_text), wide(v_own).flatten(2, 3)], 2)
    off = ~mask.any(1)[:, None, :, None]  # later rows are not written yet
    keys, values = keys.masked_fill(off, 0), values.masked_fill(off, 0)
    return _masked_attention(wide(q), keys, values, mask, live, options, q.dtype)[0]


def decode_mask(
    lo: Tensor, table: Tensor, tree: Tensor | None, S: int, step: int | Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Which of the L + C*S keys row ``step`` of each branch sees, bool [B,C,L+C*S], and whether it is on, bool [B,C]."""
    B, L, C = *lo.shape, table.shape[1]
    # The same branches with S rows each: a grid, whose rows of the step are the ones wanted.
    start = torch.arange(0, C * S, S, dtype=torch.int32, device=lo.device).expand(B, C)
    if tree is not None:  # the last row of the last node below each
        first, rows = table[:, None, :, START], table[:, None, :, LENGTH]
        below = (first >= first.mT) & (first < tree[..., END, None]) & (rows > 0)
        last = torch.where(below, start[:, None], start[..., None]).amax(-1)
        tree = tree.clone()
        tree[..., END] = last + S
    table = torch.stack([table[..., ANCHOR], start, table[..., LENGTH].clamp(max=S)], -1)
    grid = Branches(lo, table, of_rows(table, C * S, S), False, tree)
    rows = torch.arange(C, device=lo.device) * S + step
    return grid.dense_mask(window)[:, L:][:, rows], grid.live()[:, rows]


def sample_token(hidden: Tensor, head: Head, counters: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The block race over materialised logits [R,V]. Returns ids int64 [R] and their log-probabilities [R]."""
    logits = linear(hidden, head)
    if head.softcap is not None:
        logits = torch.where(logits.isinf(), logits, _softcap(logits, head.softcap))
    logits[:, head.banned] -= math.inf  # a NaN stays one
    logits = logits / (head.temperature or 1.0)
    block_max, block_lse = block_state(logits)
    if head.temperature == 0:
        ids = logits.argmax(-1)
    else:
        ids = race(block_max, block_lse, logits, counters, seed)
    lse = block_lse.logsumexp(-1)
    finite = lse.abs() < INFINITE / math.log2(math.e)
    logprob = logits.gather(1, ids.clamp(max=logits.shape[1] - 1)[:, None])[:, 0] - lse
    return torch.where(finite, ids, -1), torch.where(finite, logprob, math.nan).float()


def linear_logprob(
    hidden: Tensor, head: Head, targets: Tensor, return_entropy: bool, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
    """The log-probability of ``targets`` [R], 0 where that is -100, and the fields of ``Saved``.

    Asked to ``keep`` its logits, a back end returns them in the last two. This one never keeps any. Of another negative target,
    whose logit is not among these, the log-probability is not defined, and the backward has its other terms.
    """
    logits = final_logits(hidden, head)
    largest = logits.amax(-1)
    log_total = (logits - largest[:, None]).exp().sum(-1).log()
    logp = logits - largest[:, None] - log_total[:, None]
    kept = targets != -100
    picked = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    if return_entropy:
        entropy = -torch.where(torch.isinf(logp), 0, logp.exp() * logp).sum(-1)
    else:
        entropy = torch.zeros_like(picked)
    return torch.where(kept, picked, 0), entropy, largest, log_total, None, None


def linear_logprob_backward(
    grad_logprob: Tensor, grad_entropy: Tensor | None, hidden: Tensor, head: Head, targets: Tensor, saved: Saved,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden, weight and bias, each None if it isn't ``wanted``."""
    weight, logits = head.weight, final_logits(hidden, head)
    logp = logits - saved.largest[:, None] - saved.log_total[:, None]
    p = logp.exp()
    g = torch.where(targets != -100, grad_logprob, 0).to(p.dtype)[:, None]
    d = -g * p  # of hidden weight^T + bias, once all factors are applied
    d.scatter_add_(1, targets.clamp(min=0)[:, None], g.masked_fill(targets[:, None] < 0, 0))
    if grad_entropy is not None:
        finite = torch.where(torch.isinf(logp), 0, logp)
        d -= grad_entropy.to(p.dtype)[:, None] * p * (finite + saved.entropy[:, None])
    d = torch.where(torch.isinf(logits), 0, d) / head.temperature
    if head.softcap is not None:
        d = d * (1 - torch.tanh(linear(hidden, head) / head.softcap) ** 2)
    if head.scale is not None:
        d = d * head.scale
    dhidden = (d @ wide(weight)).to(hidden.dtype) if wanted[0] else None
    dweight = (d.T @ wide(hidden)).to(weight.dtype) if wanted[1] else None
    return dhidden, dweight, d.sum(0).to(weight.dtype) if wanted[2] else None


def rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The total x + delta, its norm, and 1 / rms [...]."""
    total = x if delta is None else (wide(x) + wide(delta)).to(x.dtype)
    unit, rstd = _unit(wide(total), eps)
    return total, (unit * (offset + wide(weight))).to(dtype), rstd[..., 0]


def rms_norm_backward(
    grad_out: Tensor, grad_total: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor, offset: float,
    delta: torch.dtype, needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x; of a delta of that dtype, None if it is x's; and of weight, None if it isn't needed."""
    d, dweight = _unit_backward(wide(grad_out), wide(total) * rstd[..., None], rstd[..., None], weight, offset)
    d = d if grad_total is None else d + wide(grad_total)
    return d.to(total.dtype), None if delta == total.dtype else d.to(delta), dweight if needs_weight else None


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x)."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _unit_backward(grad: Tensor, unit: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, from that of x / rms(x) * (offset + weight)."""
    d = grad * (offset + wide(weight))
    dweight = (grad * unit).reshape(-1, unit.shape[-1]).sum(0).to(weight.dtype)
    return rstd * (d - unit * (d * unit).mean(-1, keepdim=True)), dweight


def rotary(
    qkv: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float, offset: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """q [B,H,n,K], k [B,G,n,K], and v [B,G,n,K] if it is in qkv."""
    cos, sin, v = wide(cos)[:, :, None], wide(sin)[:, :, None], None
    if k is None:
        q, k, v = _heads(qkv, cos).split((H, G, G), 2)
        v = v.clone(memory_format=torch.contiguous_format).transpose(1, 2)
    else:
        q, k = _heads(qkv, cos), _heads(k, cos)
    out = []
    for x, weight in ((wide(q), q_weight), (wide(k), k_weight)):
        if weight is not None:
            x = _unit(x, eps)[0] * (offset + wide(weight))
        half = x.shape[-1] // 2
        turned = x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
        out.append(turned.to(qkv.dtype).contiguous().transpose(1, 2))
    return out[0], out[1], v


def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, cos: Tensor, sin: Tensor, qkv: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float, needs_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of qkv, of k if it isn't in there, and of the weights that are there if these are needed."""
    cos, sin = wide(cos)[:, :, None], wide(sin)[:, :, None]
    H, G, dtype = grad_q.shape[1], grad_k.shape[1], grad_q.dtype
    x = [_heads(y, cos) for y in (qkv, k) if y is not None]
    if len(x) == 1:
        x = list(x[0].split((H, G, G), 2))
    grads, dweights = [], []
    for i, (grad, weight) in enumerate(((grad_q, q_weight), (grad_k, k_weight))):
        d = wide(grad).transpose(1, 2)
        half, turned, dweight = -(-d.shape[-1] // 2), d * sin, None
        d = d * cos + torch.cat([turned[..., half:], -turned[..., :half]], -1)
        if weight is not None:
            d, dweight = _unit_backward(d, *_unit(wide(x[i]), eps), weight, offset)
        grads.append(d.to(dtype).flatten(2))
        dweights.append(dweight if needs_weights else None)
    if grad_v is None:
        return grads[0], grads[1], dweights[0], dweights[1]
    return torch.cat([*grads, grad_v.transpose(1, 2).flatten(2)], -1), None, dweights[0], dweights[1]


def rotary_decode(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, cos: Tensor, sin: Tensor, H: int, G: int, k_own: Tensor, v_own: Tensor,
    step: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, offset: float,
) -> Tensor:  # fmt: skip
    """``rotary``'s q, its k and v at row ``step`` of k_own and v_own [B,G,C,S,K]."""
    q, *rows = (x for x in rotary(qkv, k, cos, sin, H, G, q_weight, k_weight, eps, offset) if x is not None)
    rows += [] if v is None else [_heads(v, cos).transpose(1, 2)]
    for own, row in zip((k_own, v_own), rows, strict=True):
        own.index_copy_(3, step.long()[None], row[:, :, :, None])
    return q


def _heads(x: Tensor, cos: Tensor) -> Tensor:
    """x [B,n,heads*K] as [B,n,heads,K], for cos [...,K]."""
    return x.unflatten(-1, (-1, cos.shape[-1]))


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
_ACTIVATIONS_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "silu": torch.ops.aten.silu_backward, "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh")
}  # fmt: skip


def gated_activation(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """activation(gate) * up, both halves of gate if up is None."""
    x, y = gate.chunk(2, -1) if up is None else (gate, up)
    return (_ACTIVATIONS[activation](wide(x)) * wide(y)).to(gate.dtype)


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up; one of both where up is None."""
    x, y = (wide(z) for z in (gate.chunk(2, -1) if up is None else (gate, up)))
    dx = _ACTIVATIONS_BACKWARD[activation](wide(grad) * y, x).to(gate.dtype)
    dy = (wide(grad) * _ACTIVATIONS[activation](x)).to(gate.dtype)
    return (torch.cat([dx, dy], -1), None) if up is None else (dx, dy)


def linear(hidden: Tensor, head: Head) -> Tensor:
    """scale * (hidden weight^T + bias), [R,V]."""
    logits = wide(hidden) @ wide(head.weight).T
    if head.bias is not None:
        logits = logits + wide(head.bias)
    return logits if head.scale is None else logits * head.scale


def final_logits(hidden: Tensor, head: Head) -> Tensor:
    """softcap(scale * (hidden weight^T + bias)), banned ids at -inf, divided by the temperature."""
    logits = _softcap(linear(hidden, head), head.softcap)
    logits[:, head.banned] = -math.inf
    return logits if head.temperature == 1 else logits / head.temperature


def block_state(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit and log(sum of weights) of every block of 128 ids: two tensors [rows,V/128]."""
    rows, V = logits.shape
    if V % BLOCK:  # pad copies, even where it adds nothing
        logits = torch.nn.functional.pad(logits, (0, -V % BLOCK), value=-math.inf)
    padded = logits.view(rows, -(-V // BLOCK), BLOCK)
    return padded.amax(-1), padded.logsumexp(-1)


def race(block_max: Tensor, block_lse: Tensor, logits: Tensor, counters: Tensor, seed: Tensor) -> Tensor:
    """The id each row draws, int64 [R]; the definition is in ``quietstar_kernels.sample_token``."""
    rows, V = logits.shape
    blocks = torch.arange(block_lse.shape[1], device=logits.device)
    word0, word1 = draw_words(counters, blocks, seed)
    exponential = -torch.log1p(-(word0.double() + 0.5) / 2**32)
    winner = (block_lse.double() - exponential.log()).argmax(-1)
    first = winner * BLOCK
    columns = first[:, None] + torch.arange(BLOCK, device=logits.device)
    top = block_max.gather(1, winner[:, None])
    weights = (logits.gather(1, columns.clamp(max=V - 1)) - top).exp().masked_fill(columns >= V, 0)
    fraction = (word1.gather(1, winner[:, None]).double() + 0.5) / 2**32
    return first + invert(weights.double(), fraction[:, 0])


def invert(weights: Tensor, fraction: Tensor) -> Tensor:
    """The column of [rows,128] ``weights`` at which their running sum passes ``fraction`` of the total: group, then column."""
    rows = weights.shape[0]
    grouped = weights.view(rows, GROUPS, BLOCK // GROUPS)
    group_sums = grouped.sum(-1)
    target = fraction * group_sums.sum(-1)
    group = _first_above(group_sums, target)
    before = (group_sums.cumsum(-1) - group_sums).gather(1, group[:, None])[:, 0]
    inside = grouped[torch.arange(rows, device=weights.device), group]
    return group * grouped.shape[-1] + _first_above(inside, target - before)


def _first_above(weights: Tensor, target: Tensor) -> Tensor:
    """Index of the first running sum above ``target``. Rounding may leave none: then of the last positive weight."""
    above = (weights.cumsum(-1) > target[:, None]) & (weights > 0)
    last_positive = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.where(above.any(-1), above.int().argmax(-1), last_positive)


def _softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _masks(branches: Branches, window: int | None, rows: int) -> tuple[Tensor, Tensor]:
    """For the last ``rows`` packed rows, the dense mask [B,rows,M] and which of them are on [B,rows]."""
    skip = branches.M - rows
    return branches.dense_mask(window)[:, skip:], branches.rows_on()[:, skip:]


def _without_poison(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values without NaN and infinity, and the query rows [B,H,rows] that see one.

    Otherwise 0 * NaN would reach rows that may not see the key.
    """
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    poisoned = (mask[:, None] & bad[:, :, None]).any(-1)
    bad = bad[..., None]
    return k.masked_fill(bad, 0), v.masked_fill(bad, 0), poisoned


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, live: Tensor, options: AttentionOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Dense attention of q [B,H,rows,K] over k [B,G,keys,K] with mask [B,rows,keys]; rows that are off give 0 and -inf."""
    scale, _, softcap, sinks = options
    group = q.shape[1] // k.shape[1]
    row_on = live[:, None, :, None]
    k, v, poisoned = _without_poison(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask)
    scores = _softcap(scale * q.masked_fill(~row_on, 0) @ k.transpose(-1, -2), softcap)
    scores = scores.masked_fill(~mask[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, wide(sinks).to(lse.dtype)[None, :, None])
    p = torch.exp(scores - torch.where(torch.isinf(lse), 0, lse)[..., None])
    out = (p @ v).masked_fill(poisoned[..., None], math.nan).masked_fill(~row_on, 0)
    lse = lse.masked_fill(poisoned, math.nan).masked_fill(~live[:, None], -math.inf)
    return out.to(dtype), lse


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    """[B,H,...] to [B,G,...]: the sum over the query heads that share a key head."""
    return x.unflatten(1, (groups, -1)).sum(2)
