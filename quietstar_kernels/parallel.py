"""Over the ranks of a process group: a head whose vocabulary is sharded, and attention over a text whose rows are.

Functions that communicate are collective: all ranks of the group call them in the same order, and run their backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as collectives
from torch.nn.functional import pad

from . import _dispatch
from ._operator import call
from .checks import FLOATS, IGNORED, Checker, check_head, on_host, shown, under_autocast
from .layout import ThoughtLayout
from .linear_logprob import _backward, _fits, _forward, _wide
from .thought_attention import thought_attention

ELSEWHERE = -1  # a target that another rank has
Spans = Sequence[tuple[int, int]]  # of positions of a text, each from the first to before the end


@overload
def vocab_parallel_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., temperature: float = ..., banned: Sequence[int] = ...,
    return_entropy: Literal[False] = ..., backend: str = ..., *, keep_bytes: int | None = ...,
    first_id: int | None = ..., group: dist.ProcessGroup | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def vocab_parallel_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = ..., scale: float | None = ...,
    softcap: float | None = ..., temperature: float = ..., banned: Sequence[int] = ...,
    *, return_entropy: Literal[True], backend: str = ..., keep_bytes: int | None = ...,
    first_id: int | None = ..., group: dist.ProcessGroup | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def vocab_parallel_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None, temperature: float = 1.0, banned: Sequence[int] = (),
    return_entropy: bool = False, backend: str = "auto", *, keep_bytes: int | None = None,
    first_id: int | None = None, group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``linear_logprob`` over ranks that have some rows of the weight each, as tensor parallelism shards a head.

    A rank computes the logits of its own ids. All-reduces join the results: of R numbers, then of 3 or 4 times R, and in the
    backward of the gradient of hidden (Megatron-LM, arXiv 1909.08053, section 3). Results are equal on all ranks, and so is the
    gradient of hidden if all compute the same loss. The gradients of weight and bias are those of the rank's own rows.

    NaN and infinity do what they do in ``linear_logprob``. A row has no defined result if all logits of a shard are -inf; ids
    that are to be left out belong in ``banned``.

    Args:
        hidden: [R,D], fp32, fp16, bf16 or fp64; equal on all ranks.
        weight: the rank's rows [V',D], or a DTensor [V,D] that is sharded on dimension 0 of a mesh of one dimension. Shards may
            have different sizes, and no rows at all.
        targets: int64 [R], ids of the whole vocabulary, equal on all ranks; -100 gives log-probability 0 and no gradient.
        bias: [V'], or a DTensor [V] that is sharded as the weight is.
        scale, softcap, temperature, return_entropy, backend, keep_bytes: as in ``linear_logprob``; keep_bytes is for each rank.
        banned: ids of the whole vocabulary that are left out of the softmax, such as rows that pad it.
        first_id: id of the weight's first row; not for a DTensor.
        group: the ranks that share the vocabulary; default all; not for a DTensor, which brings its own.

    Returns:
        logprob [R], and with ``return_entropy`` entropy [R]; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: as in ``linear_logprob``; a target that no shard has, or more than one (on CPU; on a GPU it gives NaN).
    """
    check = Checker("vocab_parallel_logprob")
    if hasattr(weight, "full_tensor") and hasattr(bias, "full_tensor"):
        bias, *_ = _shard(check, bias, None, None, "bias")
    weight, first_id, group = _shard(check, weight, first_id, group)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    ids = check.banned(banned)
    if ids and ids[0] < 0:
        raise check.fail(f"banned ids must be from 0, got {shown(ids)}")
    check.tensor("hidden", hidden, "R,D", FLOATS)
    check.tensor("weight", weight, "V,D", (hidden.dtype,), hidden.device, "hidden")
    bans = [token - first_id for token in ids if 0 <= token - first_id < check["V"]]
    idle = len(bans) == check["V"]  # no id counts
    if not idle:
        scale, softcap, bans = check_head(check, hidden, weight, bias, scale, softcap, bans)
        scale, softcap = check.in_fp32("scale", scale), check.in_fp32("softcap", softcap)
    check.tensor("targets", targets, "R", (torch.int64,), hidden.device, "hidden")
    temperature = check.temperature(temperature)
    check.flag("return_entropy", return_entropy)
    if keep_bytes is not None:
        keep_bytes = check.integer("keep_bytes", keep_bytes, 0)
    if on_host(targets) and (held := targets[torch.isin(targets, torch.tensor(ids, dtype=torch.int64))]).numel():
        raise check.fail(f"targets must not hold a banned id, got {int(held[0])}")
    backend = _dispatch.choose("linear_logprob", backend, hidden.device, hidden.dtype)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    keep = differentiable and backend != "reference" and not idle and _fits(hidden, check["V"], keep_bytes, backend)
    options = scale, softcap, temperature, bans
    logprob, entropy, owners = _ShardedHead.apply(
        hidden, weight, bias, targets, first_id, options, return_entropy, keep, idle, backend, group
    )
    if on_host(targets) and (lost := targets[(owners != 1) & (targets != IGNORED)]).numel():
        raise check.fail(f"targets must be ids that one rank's shard has, or -100, got {int(lost[0])}")
    return (logprob, entropy) if return_entropy else logprob


def _shard(
    check: Checker, value: Any, first: int | None, group: dist.ProcessGroup | None, name: str = "weight"
) -> tuple[Tensor, int, dist.ProcessGroup | None]:
    """The rank's rows, the first one's place and the group."""
    if not hasattr(value, "full_tensor"):
        if first is None:
            raise check.fail("first_id, the id of the first row of weight, must be given if weight is no DTensor")
        return value, check.integer("first_id", first, 0), group
    mesh = value.device_mesh
    if mesh.ndim != 1 or not value.placements[0].is_shard(0):
        raise check.fail(f"{name} must be a DTensor with placements (Shard(dim=0),), got {value.placements}")
    if first is not None or group is not None:
        raise check.fail("first_id and group must be left out if weight is a DTensor")
    rows = -(-len(value) // mesh.size())  # of each shard before the last ones
    return value.to_local(), min(mesh.get_local_rank() * rows, len(value)), mesh.get_group()


class _ShardedHead(torch.autograd.Function):
    """Log-probabilities, entropies, and how many ranks have each target.

    With the LSE of all ids, in two parts, in place of that of its own, the op's backward makes the gradients of the shard.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, first: int, options: tuple,
        return_entropy: bool, keep: bool, idle: bool, backend: str, group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        mine = (targets >= first) & (targets < first + len(weight))
        own = torch.where(mine, targets - first, torch.where(targets == IGNORED, IGNORED, ELSEWHERE))
        states = [hidden.new_zeros(hidden.shape[:1], dtype=_wide(hidden)) for _ in range(6)]
        if not idle:
            states = call(_forward, hidden, weight, own, bias, *options, return_entropy, keep, backend)
        logprob, entropy, largest, log_total, kept, kept_rows = states
        top = torch.full_like(largest, -torch.inf) if idle else largest.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        log_part = torch.full_like(top, -torch.inf) if idle else largest - top + log_total  # the shard's LSE, without top
        part = log_part.exp()
        sums = [part, torch.where(mine, logprob + log_part, 0), mine.to(part.dtype)]
        if return_entropy:
            sums.append(torch.where(part > 0, part * (entropy - log_part), 0))
        total, picked, owners, *rest = reduced = torch.stack(sums)
        dist.all_reduce(reduced, group=group)
        log_all = total.log()
        result = torch.where(targets == IGNORED, 0, (picked - log_all).masked_fill(owners != 1, torch.nan))
        entropy = rest[0] / total + log_all if return_entropy else torch.zeros_like(result)
        if keep:  # the target's log-probability, and factors from what is kept to probabilities
            share = log_part - log_all
            kept_rows[:, 0] += share
            kept_rows[:, 1:] *= share.exp()[:, None]
        saved = (kept, kept_rows) if keep else (None, None)
        ctx.save_for_backward(hidden, weight, own, bias, entropy, largest, log_all + (top - largest), *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(owners, *(() if return_entropy else (entropy,)))
        ctx.options, ctx.idle, ctx.backend, ctx.group = options, idle, backend, group
        return result, entropy, owners

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple:
        inputs = hidden, weight, _own, bias, entropy, *_rest = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        grad_logprob = torch.zeros_like(entropy) if grad_logprob is None else grad_logprob
        if ctx.idle:
            grads = [torch.zeros_like(x) if want else None for x, want in zip((hidden, weight, bias), wanted, strict=True)]
        else:
            grads = call(_backward, grad_logprob, grad_entropy, *inputs, *ctx.options, wanted, ctx.backend)
            grads = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        if grads[0] is not None:
            dist.all_reduce(grads[0], group=ctx.group)
        return *grads, *[None] * 8


def gather_text(x: Tensor, slices: Sequence[Spans], group: dist.ProcessGroup | None = None) -> Tensor:
    """Keys or values of a whole text, of which each rank has some rows (context parallelism, as in Llama 3, arXiv 2407.21783).

    An all-gather; the backward is a reduce-scatter. Both pad the rows of each rank to the most that one has.

    Args:
        x: [B,G,rows,K], the rank's rows, those of its spans one after another.
        slices: for each rank its spans, such as ``[[(0, 5)], [(5, 9)]]``, which cover the text together; none has no rows.
        group: the ranks; default all.

    Returns:
        [B,G,L,K], in the order of the text.

    Raises:
        ValueError: slices that don't cover the text once or don't fit the group, or an x that doesn't fit them.
    """
    check = Checker("gather_text")
    rows = [sum(end - first for first, end in own) for own in slices]
    spans = sorted(span for own in slices for span in own)
    joined = all(first == before < end for (first, end), (_, before) in zip(spans, [(0, 0), *spans], strict=False))
    if min(rows, default=0) < 1 or not joined:
        raise check.fail(f"slices must cover the text from 0 on once, with rows in each span, got {shown(slices)}")
    if len(slices) != dist.get_world_size(group):
        raise check.fail(f"slices must have one entry for each of {dist.get_world_size(group)} ranks, got {len(slices)}")
    check.sizes["rows"] = rows[dist.get_rank(group)]
    check.tensor("x", x, "B,G,rows,K", FLOATS)
    # The second name is of PyTorch before 2.13.
    all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
    everyone: Any = group or dist.group.WORLD
    gathered = all_gather(pad(x, (0, 0, 0, max(rows) - x.shape[2]))[None], 0, everyone)  # [ranks,B,G,most,K]
    pieces: dict[int, Tensor] = {}
    for own, count, part in zip(slices, rows, gathered, strict=True):
        parts = part[:, :, :count].split([end - first for first, end in own], 2)
        pieces.update(zip((first for first, _ in own), parts, strict=True))
    return torch.cat([pieces[first] for first in sorted(pieces)], 2)


def text_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, documents: Sequence[int] = (0,), scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Causal attention of some rows of a text over all of it, by ``thought_attention``. It doesn't communicate.

    The rows of a span are a branch on the position before them, or a text where a document begins in it.

    Args:
        q: [B,H,rows,K], the rows of ``spans`` one after another.
        k: [B,G,L,K], of the whole text, such as ``gather_text`` returns.
        v: [B,G,L,E].
        spans: (first, end) of rows of the text, in any order.
        documents: positions at which a document begins, ascending, the first 0; rows see only their own document.
        scale, window, softcap, sinks, backend: as in ``thought_attention``.

    Returns:
        [B,H,rows,E] in q's dtype.

    Raises:
        ValueError: as in ``thought_attention``; spans outside the text, or that don't have as many rows as q.
    """
    check = Checker("text_attention")
    check.tensor("k", k, "B,G,L,K")
    check.tensor("v", v, "B,G,L,E")
    if not all(0 <= first < end <= check["L"] for first, end in spans):
        raise check.fail(f"spans must be (first, end) with 0 <= first < end <= L={check['L']}, got {shown(spans)}")
    if list(documents) != sorted({0, *documents}):
        raise check.fail(f"documents must ascend from 0, got {shown(documents)}")
    check.sizes["rows"] = sum(end - first for first, end in spans)
    check.tensor("q", q, "B,H,rows,K")
    attend = partial(thought_attention, scale=scale, window=window, softcap=softcap, sinks=sinks, backend=backend)
    outs, row = [], 0
    for first, end in spans:
        starts = [start for start in documents if first <= start < end]
        begun, cut = max(start for start in documents if start <= first), min([*starts, end])
        for begin, top, after in ((begun, first, cut), (cut, cut, end)):
            if top < after:
                layout = _layout(check["B"], top - begin, after - top, tuple(start - begin for start in starts), k.device)
                queries, row = q[:, :, row : row + after - top], row + after - top
                which = "thoughts" if begin < top else "all"
                outs.append(attend(queries, k[:, :, begin:after], v[:, :, begin:after], layout, query_rows=which))
    return torch.cat(outs, 2)


@lru_cache(maxsize=64)  # each layer asks for the same
def _layout(batch: int, before: int, rows: int, starts: tuple[int, ...], device: torch.device) -> ThoughtLayout:
    """``rows`` after ``before`` positions of their document; or, of documents that begin at ``starts``, all."""
    if before:
        anchors = torch.full((batch, 1), before - 1, device=device)
        return ThoughtLayout.packed(anchors, torch.full_like(anchors, rows), before, rows=rows)
    documents = torch.isin(torch.arange(rows, device=device), torch.tensor(starts, device=device)).cumsum(0)
    return ThoughtLayout.from_documents(documents.expand(batch, rows), 1, 1).text_only()
