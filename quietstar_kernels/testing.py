"""For testing these kernels and code that uses them: a tolerance rule, the ops in plain PyTorch, and random inputs.

    generator = torch.Generator().manual_seed(0)
    layout = random_layout(generator)
    inputs = attention_inputs(generator, layout)
    grad_out = torch.randn(..., generator=generator)
    assert_op_close_as_plain(my_attention, plain_attention, inputs, (grad_out,), layout=layout)

All random numbers come from a ``torch.Generator`` on CPU, so that a seed gives the same test on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quietstar_kernels.layout import ThoughtLayout

__all__ = [
    "LAYOUT_KINDS",
    "assert_close_as_plain",
    "assert_op_close_as_plain",
    "attention_inputs",
    "attention_magnitudes",
    "decode_inputs",
    "forward_backward",
    "logprob_inputs",
    "plain_attention",
    "plain_decode",
    "plain_log_softmax",
    "plain_logprob",
    "random_layout",
    "sample_inputs",
]

FACTOR = 2
FLOOR_ULPS = 8

LAYOUT_KINDS = ("every", "anchors", "left", "right", "both", "documents", "any_lo", "ragged", "no_anchors", "one")


def assert_close_as_plain(got: Tensor, plain: Tensor, truth: Tensor, what: str = "result", magnitude: float = 0.0) -> float:
    """Assert that the error of ``got`` is at most twice that of plain PyTorch in the same dtype.

    Both errors are the largest absolute difference from ``truth``. As a plain result may happen to be exact, a few ulps (of
    got's dtype, at the largest magnitude of the truth) are always allowed. Infinities must be the same.

    Args:
        got: the result to judge.
        plain: the same maths in plain PyTorch, with inputs of the same dtype.
        truth: the same maths in fp64, with upcast inputs.
        what: name of the result in the message.
        magnitude: of the terms that the result is a sum of, if they may cancel; the ulps are at least those of this number.

    Returns:
        The largest error as a part of what is allowed, from 0 to 1.

    Raises:
        AssertionError: the error is larger, with its place and the numbers; or the shape is wrong, or there is a NaN.
    """
    if not got.shape == plain.shape == truth.shape:
        raise AssertionError(f"{what}: got shape {list(got.shape)}, plain {list(plain.shape)}, truth {list(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().double()
    error, plain_error = _error(got, truth), float(_error(plain, truth).max())
    if truth.isnan().any() or not math.isfinite(plain_error):
        raise AssertionError(f"{what}: truth or plain result is not finite, these inputs can't judge anything")
    magnitude = max(magnitude, float(torch.where(truth.isinf(), 0, truth).abs().max()))
    bound = FACTOR * plain_error + FLOOR_ULPS * torch.finfo(got.dtype).eps * magnitude
    worst = float(error.max())
    if worst > bound:
        place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise AssertionError(
            f"{what}: error {worst:.3g} at {place} of shape {list(got.shape)} exceeds {bound:.3g} by {worst - bound:.3g}: "
            f"got {got[tuple(place)].item()}, truth {truth[tuple(place)].item()}; plain errs {plain_error:.3g} at most"
        )
    return worst / bound if bound else 0.0


def _error(value: Tensor, truth: Tensor) -> Tensor:
    """Absolute difference; equal infinities differ by 0, a NaN by infinity."""
    value = value.detach().double()
    return torch.where(value == truth, 0, (value - truth).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def forward_backward(
    op: Callable[..., Any], inputs: dict[str, Any], grad_outputs: Sequence[Tensor], **options: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run ``op(**inputs, **options)`` and differentiate it.

    Args:
        op: a function that returns a tensor or several.
        inputs: tensors by argument name; those of a floating dtype get a gradient; may be None.
        grad_outputs: one for each of the first outputs, converted to its dtype; no backward if empty.
        options: further arguments.

    Returns:
        The outputs, and the gradients by input name.
    """
    leaves = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for x in wanted.values():
        x.requires_grad_(len(grad_outputs) > 0)
    outputs = op(**leaves, **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not grad_outputs:
        return outputs, {}
    judged = outputs[: len(grad_outputs)]
    grads = [grad.to(output.dtype) for grad, output in zip(grad_outputs, judged, strict=True)]
    result = torch.autograd.grad(judged, list(wanted.values()), grads, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in outputs], dict(zip(wanted, result, strict=True))


def assert_op_close_as_plain(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: dict[str, Any],
    grad_outputs: Sequence[Tensor] = (),
    what: str = "",
    magnitudes: dict[str, float] | None = None,
    **options: Any,
) -> float:
    """Apply ``assert_close_as_plain`` to every output and every gradient of an op.

    Args:
        op: the op to judge, called as ``op(**inputs, **options)``.
        plain: the same in plain PyTorch, called with ``inputs`` as they are, and upcast to fp64 for the truth.
        inputs: as in ``forward_backward``.
        grad_outputs: as in ``forward_backward``.
        what: name of the case in the message.
        magnitudes: by input name, of the terms of a gradient that may cancel.
        options: further arguments of both functions.

    Returns:
        The largest error as a part of what is allowed, from 0 to 1.

    Raises:
        AssertionError: as in ``assert_close_as_plain``, naming the output or gradient; or a gradient has the wrong dtype.
    """
    found = _results(op, plain, inputs, grad_outputs, what, magnitudes, **options)
    return max(assert_close_as_plain(**result) for result in found)


def _results(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: dict[str, Any],
    grad_outputs: Sequence[Tensor] = (),
    what: str = "",
    magnitudes: dict[str, float] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """The arguments of ``assert_close_as_plain`` for every output and gradient, from those of ``assert_op_close_as_plain``."""
    upcast = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    outputs, grads = forward_backward(op, inputs, grad_outputs, **options)
    plain_outputs, plain_grads = forward_backward(plain, inputs, grad_outputs, **options)
    true_outputs, true_grads = forward_backward(plain, upcast, [grad.double() for grad in grad_outputs], **options)
    for i, (got, like, truth) in enumerate(zip(outputs, plain_outputs, true_outputs, strict=True)):
        yield {"got": got, "plain": like, "truth": truth, "what": f"{what} output {i}".strip()}
    for name, grad in grads.items():
        title = f"{what} gradient of {name}".strip()
        if grad.dtype != inputs[name].dtype:
            raise AssertionError(f"{title}: got {grad.dtype}, want {inputs[name].dtype}")
        magnitude = (magnitudes or {}).get(name, 0.0)
        yield {"got": grad, "plain": plain_grads[name], "truth": true_grads[name], "what": title, "magnitude": magnitude}


def attention_magnitudes(inputs: dict[str, Any], grad_out: Tensor, scale: float | None = None) -> dict[str, float]:
    """Typical size of the terms that cancel in the gradients of attention, such as scale * (grad_out · v) * k.

    The gradient of a score is p * (grad_out · v - grad_out · out). In a row that sees one key it is 0, but neither term is.
    """
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    score = v.shape[-1] ** 0.5 * _rms(grad_out) * _rms(v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return {"q": factor * score * _largest(k), "k": factor * score * _largest(q), "sinks": score}


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt()) if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max()) if x.numel() else 0.0


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThoughtLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_rows: str = "all",
) -> tuple[Tensor, Tensor]:
    """``thought_attention`` with ``return_lse`` in dense PyTorch, every step in q's dtype; differentiable by autograd."""
    skip = 0 if query_rows == "all" else layout.L
    return _plain(q, k, v, layout.dense_mask(window)[:, skip:], scale, softcap, sinks)


def plain_decode(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_own: Tensor,
    v_own: Tensor,
    layout: ThoughtLayout,
    step: int | Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``thought_decode`` in dense PyTorch, every step in q's dtype; rows after ``step`` must be finite."""
    mask = layout.dense_mask(window)[:, layout.L :][:, int(step) :: layout.S]
    k, v = torch.cat([k_text, k_own.flatten(2, 3)], 2), torch.cat([v_text, v_own.flatten(2, 3)], 2)
    return _plain(q, k, v, mask, scale, softcap, sinks)[0]


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,rows,K] over k, v [B,G,keys,...] under a mask [B,rows,keys]; a row that sees nothing is off."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    on = mask.any(-1)[:, None]
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.matmul(q, k.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A row that is off sees everything, so that nothing is NaN; its result is dropped.
    scores = scores.masked_fill(~(mask[:, None] | ~on[..., None]), -math.inf)
    if sinks is not None:
        column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    # exp(score - lse) as in the op, in fp32 even for half precision; so does torch.softmax.
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    lse = torch.logsumexp(wide, -1)
    p = torch.exp(wide - lse[..., None])[..., : k.shape[2]].to(q.dtype)
    return torch.matmul(p, v).masked_fill(~on[..., None], 0), lse.masked_fill(~on, -math.inf)


def plain_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    banned: Sequence[int] = (),
) -> Tensor:
    """The log of the distribution of ``sample_token`` and ``linear_logprob``, [R,V], every step in hidden's dtype."""
    logits = torch.matmul(hidden, weight.T)
    if bias is not None:
        logits = logits + bias
    if scale is not None:
        logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    out = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    out[list(banned)] = True
    return torch.log_softmax(logits.masked_fill(out, -math.inf) / temperature, -1)


def plain_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """``linear_logprob`` with ``return_entropy`` in dense PyTorch, every step in hidden's dtype; differentiable by autograd.

    Args:
        options: scale, softcap, temperature, banned.
    """
    logp = plain_log_softmax(hidden, weight, bias, **options)
    logprob = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == -100, 0)
    return logprob, -(logp.exp() * logp.masked_fill(logp.isinf(), 0)).sum(-1)


def random_layout(
    generator: torch.Generator,
    kind: str | None = None,
    max_batch: int = 3,
    max_text: int = 12,
    max_thoughts: int = 3,
    max_rows: int = 5,
    device: torch.device | str | None = None,
) -> ThoughtLayout:
    """A layout of random sizes, from 1 to the given ones.

    Args:
        generator: on CPU.
        kind: one of ``LAYOUT_KINDS``, by default a random one: "every" position; chosen "anchors" with -1 at the end; padding
            "left", "right" or "both"; packed "documents", some with padding; "any_lo" (legal, though no real text has it);
            "ragged" thoughts; "no_anchors" (P = 0); "one" (all sizes 1). All but "every", "no_anchors" and "one" may also
            have chosen anchors and ragged thoughts.

    Raises:
        ValueError: no such kind.
    """
    if kind is None:
        kind = LAYOUT_KINDS[_integer(generator, 0, len(LAYOUT_KINDS) - 1)]
    if kind not in LAYOUT_KINDS:
        raise ValueError(f"random_layout: kind must be one of {', '.join(LAYOUT_KINDS)}, got {kind!r}")
    if kind == "one":
        return ThoughtLayout.every_position(1, 1, 1, 1, device)
    B, L, N, S = (_integer(generator, 1, most) for most in (max_batch, max_text, max_thoughts, max_rows))
    if kind == "every":
        return ThoughtLayout.every_position(B, L, N, S, device)
    anchors = None
    if kind == "no_anchors":
        anchors = torch.zeros(B, 0, dtype=torch.int32)
    elif kind == "anchors" or _integer(generator, 0, 1):
        anchors = _random_anchors(generator, B, L)
    if kind in ("left", "right", "both"):
        first = _integers(generator, 0, L, B) if kind != "right" else torch.zeros(B, dtype=torch.int64)
        last = _integers(generator, 0, L, B) if kind != "left" else torch.full((B,), L)
        first, last = torch.minimum(first, last), torch.maximum(first, last)
        t = torch.arange(L)
        layout = ThoughtLayout.from_padding((t >= first[:, None]) & (t < last[:, None]), N, S, anchors)
    elif kind == "documents":
        ids = torch.randint(0, 3, (B, L), generator=generator).eq(0).cumsum(1)
        padded = _integers(generator, L // 2, 2 * L, B)
        ids = ids.masked_fill(torch.arange(L) >= padded[:, None], -1)
        layout = ThoughtLayout.from_documents(ids, N, S, anchors)
    elif kind == "any_lo":
        lo = (torch.rand(B, L, generator=generator) * torch.arange(1, L + 1)).long()
        layout = ThoughtLayout.at(torch.arange(L).expand(B, L) if anchors is None else anchors, N, S, lo=lo)
    else:
        layout = ThoughtLayout.at(torch.arange(L).expand(B, L) if anchors is None else anchors, N, S, text_length=L)
    if kind == "ragged" or _integer(generator, 0, 2) == 0:
        length = torch.minimum(layout.length, torch.randint(0, S + 1, layout.length.shape, generator=generator))
        layout = ThoughtLayout.at(layout.anchor, N, S, lo=layout.lo, length=length)
    return layout if device is None else layout.to(device)


def _random_anchors(generator: torch.Generator, B: int, L: int) -> Tensor:
    """[B,P]: some positions of each row, ascending, then -1; P is sometimes one more than the longest row needs."""
    chosen = torch.rand(B, L, generator=generator) < torch.rand(B, 1, generator=generator)
    places = int(chosen.sum(1).max()) + _integer(generator, 0, 1)
    anchors = torch.full((B, places), -1)
    for row, positions in zip(anchors, chosen, strict=True):
        row[: int(positions.sum())] = positions.nonzero()[:, 0]
    return anchors


def attention_inputs(
    generator: torch.Generator,
    layout: ThoughtLayout,
    heads: int = 4,
    groups: int = 2,
    width: int = 8,
    value_width: int | None = None,
    sinks: bool = False,
    query_rows: str = "all",
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """q, k, v and sinks for ``thought_attention``, on the layout's device.

    Args:
        heads: H.
        groups: G.
        width: K.
        value_width: E, default K.
        sinks: make sinks; else they are None.
        strided: make transposed views of [B,M,H,K] inside a wider storage, so that rows are neither contiguous nor aligned;
            sinks are every second number of a storage.
    """
    rows = layout.M if query_rows == "all" else layout.R
    sizes = {"q": (heads, rows, width), "k": (groups, layout.M, width)}
    sizes["v"] = (groups, layout.M, value_width or width)
    inputs = {name: _heads(generator, layout, *size, strided, dtype) for name, size in sizes.items()}
    return inputs | {"sinks": _sinks(generator, layout, heads, strided, dtype) if sinks else None}


def decode_inputs(
    generator: torch.Generator,
    layout: ThoughtLayout,
    heads: int = 4,
    groups: int = 2,
    width: int = 8,
    value_width: int | None = None,
    sinks: bool = False,
    strided: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """q, k_text, v_text, k_own, v_own and sinks for ``thought_decode``; arguments as in ``attention_inputs``."""
    thoughts, S = layout.P * layout.N, layout.S
    value_width = value_width or width
    sizes = {"q": (heads, thoughts, width), "k_text": (groups, layout.L, width), "v_text": (groups, layout.L, value_width)}
    sizes |= {"k_own": (groups, thoughts * S, width), "v_own": (groups, thoughts * S, value_width)}
    inputs = {name: _heads(generator, layout, *size, strided, dtype) for name, size in sizes.items()}
    inputs = {name: x.unflatten(2, (thoughts, S)) if "own" in name else x for name, x in inputs.items()}
    return inputs | {"sinks": _sinks(generator, layout, heads, strided, dtype) if sinks else None}


def sample_inputs(
    generator: torch.Generator,
    rows: int,
    width: int = 8,
    vocabulary: int = 333,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """hidden, weight, bias and counters for ``sample_token``; the standard deviation of the logits is about 2."""
    hidden = _normal(generator, (rows, width), dtype, device)
    weight = _normal(generator, (vocabulary, width), dtype, device, deviation=2 * width**-0.5)
    limits = (2**31 - 1, 4096, 8, 16)
    counters = torch.stack([torch.randint(0, most, (rows,), generator=generator) for most in limits], 1)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": _normal(generator, (vocabulary,), dtype, device) if bias else None,
        "counters": counters.int().to(device),
    }


def logprob_inputs(
    generator: torch.Generator,
    rows: int,
    width: int = 8,
    vocabulary: int = 333,
    bias: bool = False,
    banned: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """hidden, weight, bias and targets for ``linear_logprob``: about one target in six is -100, none is banned."""
    inputs = sample_inputs(generator, rows, width, vocabulary, bias, dtype, device)
    del inputs["counters"]
    allowed = torch.tensor([i for i in range(vocabulary) if i not in banned])
    targets = allowed[torch.randint(0, len(allowed), (rows,), generator=generator)]
    ignored = torch.randint(0, 6, (rows,), generator=generator) == 0
    return inputs | {"targets": targets.masked_fill(ignored, -100).to(device)}


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _integers(generator: torch.Generator, low: int, high: int, count: int) -> Tensor:
    return torch.randint(low, high + 1, (count,), generator=generator)


def _normal(
    generator: torch.Generator,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str | None,
    deviation: float = 1.0,
) -> Tensor:
    return (deviation * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def _sinks(generator: torch.Generator, layout: ThoughtLayout, heads: int, strided: bool, dtype: torch.dtype) -> Tensor:
    sinks = _normal(generator, (heads,), dtype, layout.device)
    return sinks.repeat_interleave(2)[::2] if strided else sinks


def _heads(
    generator: torch.Generator,
    layout: ThoughtLayout,
    heads: int,
    rows: int,
    width: int,
    strided: bool,
    dtype: torch.dtype,
) -> Tensor:
    """[B,heads,rows,width]."""
    if not strided:
        return _normal(generator, (layout.B, heads, rows, width), dtype, layout.device)
    return _normal(generator, (layout.B, rows, heads, width + 1), dtype, layout.device)[..., 1:].transpose(1, 2)
