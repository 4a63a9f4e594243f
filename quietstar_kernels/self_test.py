"""Small cases of the ops: a back end runs one on its device, and the CPU judges the result.

``python -m quietstar_kernels check`` runs them all; ``auto`` runs one of an op before it takes a back end on an unknown GPU
(``_first_use``). A judge returns the error as a part of what is allowed, at most 1. It raises AssertionError, with the numbers,
if the result is wrong. Plain PyTorch and the truth in fp64 are computed on the CPU, so that no GPU judges itself. Every case
has its own random generator.

The rule of ``testing`` bounds the largest error by what rounding every step to 16 bits would cost. As these inputs never
change, there is a bound on the mean error too, which catches a result that is 2 % off everywhere.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from . import _dispatch, testing
from .delta import fla, reference
from .gated_activation import gated_activation
from .layout import ThoughtLayout
from .linear_logprob import linear_logprob
from .rms_norm import rms_norm
from .rotary import rotary
from .rotary_decode import rotary_decode
from .sample_token import sample_token
from .testing import tolerance
from .testing.plain import plain_conv
from .thought_attention import thought_attention
from .thought_conv import thought_conv
from .thought_decode import thought_decode
from .thought_delta import BACKENDS as DELTA_BACKENDS
from .thought_delta import columns, thought_delta

ALL = (torch.float32, torch.float16, torch.bfloat16)
WORKERS = {"cuda": 8}  # rows at a time: on a GPU nearly all the time is spent compiling
ROW = "{:<18} {:<10} {:<9} {:>5} {:>6} {:>8}  {}"
MEAN_ULPS = {torch.float32: 64, torch.float16: 2, torch.bfloat16: 2}  # correct back ends reach 5, and 0.5 in 16 bits
TEXT = 160  # positions of the text in FIRST_USE: several blocks of any kernel
R, D = 64, 64  # rows and width of hidden states
SEED = 33  # with this one no draw of ``sampling`` is a close call, so every back end must draw the same


def chosen_anchors(text: int) -> ThoughtLayout:
    """Three and four anchors, the second text padded on the left."""
    anchors = torch.tensor([[1, text // 2, text - 1, -1], [text // 4 + 1, text // 3, text // 2, text - 1]])
    return ThoughtLayout.from_padding(torch.arange(text) >= torch.tensor([[0], [text // 4]]), 2, 5, anchors)


def attention(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    layout: ThoughtLayout,
    heads: int = 4,
    groups: int = 2,
    K: int = 64,
    E: int | None = None,
    sinks: bool = False,
    backward: bool = True,
    **options: Any,
) -> float:
    """``thought_attention``: out and lse, and with ``backward`` the gradients of q, k, v and sinks."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = testing.attention_inputs(generator, layout, heads, groups, K, E, sinks, dtype=dtype)
    grad_out = torch.randn(*inputs["q"].shape[:3], E or K, generator=generator).to(dtype)
    op = _on(device, partial(thought_attention, return_lse=True, backend=backend), (dtype, torch.float32))
    magnitudes = testing.attention_magnitudes(inputs, grad_out)
    grads = [grad_out] if backward else []
    return _worst(op, testing.plain_attention, inputs, grads, magnitudes=magnitudes, layout=layout, **options)


def decode(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    layout: ThoughtLayout,
    heads: int = 4,
    groups: int = 2,
    K: int = 64,
    E: int | None = None,
    sinks: bool = False,
    **options: Any,
) -> float:
    """``thought_decode`` at the first, a middle and the last row of the thoughts."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = testing.decode_inputs(generator, layout, heads, groups, K, E, sinks, dtype=dtype)
    op = _on(device, partial(thought_decode, backend=backend), (dtype,))
    judge = partial(_worst, op, testing.plain_decode, inputs, layout=layout, **options)
    rows = int(layout.length.max())
    return max(judge(step=step, what=f"step {step}") for step in sorted({0, rows // 2, rows - 1}))


def sampling(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int = 1000,
    temperature: float = 1.0,
    **options: Any,
) -> float:
    """``sample_token``: the ids that the reference draws in fp64, and their log-probabilities."""
    inputs = exact_inputs(R, D, vocabulary)
    cast = {d: {name: x.to(d) if x.is_floating_point() else x for name, x in inputs.items()} for d in (dtype, torch.float64)}
    op: Callable[..., Any] = partial(sample_token, seed=SEED, temperature=temperature, **options)
    got, logprob = _on(device, partial(op, backend=backend), (torch.int64, torch.float32))(**cast[dtype])
    ids, _ = op(**cast[torch.float64], backend="reference")
    if differ := int((got != ids).sum()):
        row = int((got != ids).nonzero()[0])
        raise AssertionError(f"{differ} of {R} ids are not the reference's, row {row}: got {got[row]}, want {ids[row]}")

    options["temperature"] = temperature or 1.0

    def plain(inputs: dict[str, Tensor]) -> Tensor:
        logs = testing.plain_log_softmax(inputs["hidden"], inputs["weight"], inputs["bias"], **options)
        return logs.gather(1, ids[:, None])[:, 0]

    return _judge(logprob, plain(cast[dtype]), plain(cast[torch.float64]), "logprob")


def exact_inputs(rows: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    """The inputs of ``sampling``: logits are multiples of 1/8, which no dtype rounds, and many are equal."""
    inputs = testing.sample_inputs(torch.Generator().manual_seed(SEED), rows, width, vocabulary, bias=True)
    inputs |= {"hidden": inputs["hidden"].round().clamp(-1, 1)}
    return inputs | {name: (8 * inputs[name]).round() / 8 for name in ("weight", "bias")}


def logprob(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int = 1000,
    backward: bool = True,
    banned: Sequence[int] = (),
    **options: Any,
) -> float:
    """``linear_logprob`` with entropy, and with ``backward`` the gradients of hidden, weight and bias."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = testing.logprob_inputs(generator, R, D, vocabulary, bias=True, banned=banned, dtype=dtype)
    grads = list(torch.randn(2, R, generator=generator)) if backward else []
    op = _on(device, partial(linear_logprob, return_entropy=True, backend=backend), (torch.float32, torch.float32))
    return _worst(op, testing.plain_logprob, inputs, grads, banned=banned, **options)


def convolution(backend: str, device: torch.device, dtype: torch.dtype, layout: ThoughtLayout) -> float:
    """``thought_conv`` of four taps, and the gradients of x, weight and bias."""
    generator, shape = torch.Generator().manual_seed(SEED), (layout.B, layout.M, 64)
    inputs = _normal(generator, dtype, x=shape, weight=(64, 4), bias=(64,))
    return _worst(
        _on(device, thought_conv, (dtype,)), plain_conv, inputs, [torch.randn(shape, generator=generator)], layout=layout
    )


def delta(backend: str, device: torch.device, dtype: torch.dtype, layout: ThoughtLayout, by_channel: bool = False) -> float:
    """``thought_delta``: out, and the gradients of q, k, v, g and beta."""
    generator, rows, K = torch.Generator().manual_seed(SEED), (layout.B, 4, layout.M), 64
    keys, decay = (layout.B, 2, layout.M, K), (*rows, K) if by_channel else rows
    inputs = _normal(generator, dtype, q=keys, k=keys, v=(*rows, K), g=decay, beta=rows)
    inputs |= {name: normalize(inputs[name], dim=-1) for name in "qk"}
    inputs |= {"g": -softplus(inputs["g"] - 2), "beta": inputs["beta"].sigmoid()}

    def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: ThoughtLayout) -> Tensor:
        return reference.thought_delta(q, k, v, columns(g, v), beta[..., None], layout, None)[0]

    op = _on(device, lambda **arguments: thought_delta(**arguments, backend=backend)[0], (dtype,))
    return _worst(op, plain, inputs, [torch.randn(*rows, K, generator=generator)], layout=layout)


def norm(backend: str, device: torch.device, dtype: torch.dtype, D: int = D, backward: bool = True) -> float:
    """``rms_norm`` of a sum, and with ``backward`` the gradients of x, delta and weight."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = _normal(generator, dtype, x=(R, D), weight=(D,), delta=(R, D))
    grads = list(torch.randn(2, R, D, generator=generator)) if backward else []
    return _worst(_on(device, partial(rms_norm, backend=backend), (dtype, dtype)), testing.plain_norm, inputs, grads)


def turns(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    K: int = 64,
    norms: bool = True,
    backward: bool = True,
    op: Callable[..., Any] = rotary,
) -> float:
    """``rotary`` of all in one tensor, and with ``backward`` the gradients of it and of the weights."""
    generator, B, n, (H, G) = torch.Generator().manual_seed(SEED), 2, R // 2, (4, 2)
    inputs: dict[str, Any] = _normal(generator, dtype, qkv=(B, n, (H + 2 * G) * K), q_weight=(K,), k_weight=(K,))
    inputs |= {"k": None, "v": None} | ({} if norms else {"q_weight": None, "k_weight": None})
    angles = torch.rand(B, n, K, generator=generator) * 6
    grads = [torch.randn(B, heads, n, K, generator=generator) for heads in (H, G, G)] if backward else []
    options = {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype), "heads": (H, G)}
    return _worst(_on(device, partial(op, backend=backend), (dtype,) * 3), testing.plain_rotary, inputs, grads, **options)


def _step(qkv: Tensor, heads: tuple[int, int], cos: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``rotary_decode``, and the row that it writes."""
    own = qkv.new_zeros(2, len(qkv), heads[1], qkv.shape[1], 3, cos.shape[-1])
    q = rotary_decode(qkv, heads=heads, cos=cos, k_own=own[0], v_own=own[1], step=1, **options)
    return q, own[0, :, :, :, 1], own[1, :, :, :, 1]


def gates(backend: str, device: torch.device, dtype: torch.dtype, activation: str = "silu", backward: bool = True) -> float:
    """``gated_activation`` of two tensors, and with ``backward`` their gradients."""
    generator = torch.Generator().manual_seed(SEED)
    inputs = _normal(generator, dtype, gate=(R, 100), up=(R, 100))
    grads = [torch.randn(R, 100, generator=generator)] if backward else []
    op = _on(device, partial(gated_activation, backend=backend), (dtype,))
    return _worst(op, testing.plain_gated, inputs, grads, activation=activation)


def _normal(generator: torch.Generator, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


# By op. Each takes a back end, a device and a dtype; its sizes and the op's options are keywords.
JUDGES: dict[str, Callable[..., float]] = {
    "thought_attention": attention,
    "thought_decode": decode,
    "sample_token": sampling,
    "linear_logprob": logprob,
    "rms_norm": norm,
    "rotary": turns,
    "rotary_decode": partial(turns, op=_step, backward=False),
    "gated_activation": gates,
    "thought_conv": convolution,
    "thought_delta": delta,
}
BACKENDS = dict.fromkeys(_dispatch.OPS, tuple(_dispatch.BACKENDS)) | {
    "thought_conv": ("pytorch",),
    "thought_delta": tuple(DELTA_BACKENDS),
}


def why_not(op: str, backend: str, device: torch.device, dtype: torch.dtype | None = None, **widths: int) -> str | None:
    """As ``_dispatch.why_not``, for all of ``BACKENDS``."""
    if backend not in BACKENDS[op]:
        return f"it has no {op}"
    if op in _dispatch.OPS:
        return _dispatch.why_not(op, backend, device, dtype, **widths)
    return fla.why_not(device, dtype) if backend == "fla" else None


def _first_use(judge: Callable[..., float]) -> Callable[..., float]:
    """``judge`` of a layout and heads that are quick to try."""
    return lambda *arguments, **options: judge(*arguments, layout=chosen_anchors(TEXT), heads=2, groups=1, **options)


# What ``auto`` tries before it takes a back end on an unknown GPU.
FIRST_USE = JUDGES | {"thought_attention": _first_use(attention), "thought_decode": _first_use(decode)}


def _worst(op: Callable[..., Any], plain: Callable[..., Any], inputs: dict[str, Any], *rest: Any, **options: Any) -> float:
    """The largest of all outputs and gradients."""
    return max(_judge(**result) for result in tolerance.results(op, plain, inputs, *rest, **options))


def _judge(got: Tensor, plain: Tensor, truth: Tensor, what: str, magnitude: float = 0.0) -> float:
    worst = testing.assert_close_as_plain(got, plain, truth, what, magnitude)
    counts = truth.isfinite()
    error = float((got.double() - truth)[counts].square().mean().sqrt())
    bound = MEAN_ULPS[got.dtype] * torch.finfo(got.dtype).eps * float(truth[counts].square().mean().sqrt())
    if error > bound:
        raise AssertionError(f"{what}: root mean square of the error {error:.3g} exceeds {bound:.3g}")
    return max(worst, error / bound)


def _on(device: torch.device, op: Callable[..., Any], dtypes: Sequence[torch.dtype]) -> Callable[..., tuple[Tensor, ...]]:
    """``op`` with arguments and results on the CPU, run on ``device``. The outputs must have ``dtypes``."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        there = {name: x.to(device) if isinstance(x, Tensor | ThoughtLayout) else x for name, x in arguments.items()}
        outputs = op(**there)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for i, (output, dtype) in enumerate(zip(outputs, dtypes, strict=True)):
            if output.dtype != dtype:
                raise AssertionError(f"output {i}: got {output.dtype}, want {dtype}")
        return tuple(output.cpu() for output in outputs)

    return run


@dataclass(frozen=True)
class Case:
    """Arguments of one of ``JUDGES``, and the dtypes to run it in, if the back end serves them."""

    op: str
    dtypes: tuple[torch.dtype, ...]
    arguments: dict[str, Any]


def cases(interpreted: bool) -> list[Case]:
    """Few dtypes, widths and options, each of which a kernel is compiled for, in several layouts.

    Args:
        interpreted: make them smaller, for Triton's interpreter.
    """
    short, long, vocabulary = (16, 40, 300) if interpreted else (48, 400, 5003)
    every, anchors, ragged = ThoughtLayout.every_position(1, short, 2, 3), chosen_anchors(long), ragged_thoughts(short)
    everything = {"groups": 4, "K": 128, "window": long // 3, "softcap": 20.0, "sinks": True}
    odd = {"heads": 3, "groups": 1, "K": 40, "E": 24}
    found = []
    for op in ("thought_attention", "thought_decode"):
        found += [Case(op, ALL, {"layout": layout}) for layout in (every, anchors, ragged, branches(long), tree(long))]
        found += [Case(op, (torch.float32, torch.bfloat16), {"layout": layout, **everything}) for layout in (every, anchors)]
        found += [Case(op, (torch.float16,), {"layout": ragged, **odd})]
    found += [Case("thought_attention", (torch.float32, torch.bfloat16), {"layout": branches(long, own="full")})]
    options = {"vocabulary": vocabulary, "temperature": 0.7, "scale": 0.5, "softcap": 8.0, "banned": (3, 77)}
    for op in ("sample_token", "linear_logprob"):
        found += [Case(op, ALL, {"vocabulary": vocabulary}), Case(op, (torch.float32, torch.bfloat16), options)]
    for op in ("rotary", "rotary_decode"):
        found += [Case(op, ALL, {}), Case(op, (torch.float32, torch.bfloat16), {"K": 40, "norms": False})]
    found += [Case("gated_activation", ALL, {"activation": name}) for name in ("silu", "gelu_tanh")]
    found += [Case("rms_norm", ALL, {"D": width}) for width in (D, 3000)]
    documents = ThoughtLayout.from_documents(3 * torch.arange(short)[None] // short, 2, 3)
    for layout in (every, chosen_anchors(short), documents, ragged, branches(short), tree(short)):
        found += [Case(op, ALL, {"layout": layout}) for op in ("thought_conv", "thought_delta")]
        found += [Case("thought_delta", (torch.float32, torch.bfloat16), {"layout": layout, "by_channel": True})]
    return found + [Case("sample_token", ALL, {"vocabulary": vocabulary, "temperature": 0.0})]


def ragged_thoughts(text: int) -> ThoughtLayout:
    """Thoughts of 0 to 5 rows."""
    length = torch.arange(text * 2).view(1, text, 2) % 6
    return ThoughtLayout.at(torch.arange(text)[None], 2, 5, text_length=text, length=length)


def branches(text: int, own: str = "causal") -> ThoughtLayout:
    """Packed: several on an anchor, from none to as many rows as the text has."""
    anchors = torch.tensor([text // 3, text // 3, text // 2, text - 1, text - 1])[None]
    return ThoughtLayout.packed(anchors, torch.tensor([1, text // 2, 0, text, 7])[None], text, own=own)


def tree(text: int) -> ThoughtLayout:
    """Two long branches, one with two more at its end, of which one has another."""
    anchors = torch.tensor([[text // 3, -1, -1, -1, text - 1]])
    parents, lengths = torch.tensor([[-1, 0, 1, 0, -1]]), torch.tensor([[text // 2, 7, 20, text // 3, 9]])
    return ThoughtLayout.tree(anchors, parents, lengths, text)


def check(device: torch.device, backends: Sequence[str], ops: Sequence[str]) -> bool:
    """Print a table with a row for each op, back end and dtype. True if all results are right."""
    print(ROW.format("op", "back end", "dtype", "cases", "worst", "seconds", "result (worst: error over what is allowed)"))
    began = time.monotonic()
    pairs = [(op, backend) for op in ops for backend in backends if backend in BACKENDS[op]]
    rows = [(device, *pair, dtype) for pair in pairs for dtype in ALL]
    failed = 0
    with nan_in_new_tensors(), ThreadPoolExecutor(WORKERS.get(device.type, 1)) as pool:
        for lines, failures in pool.map(lambda row: check_row(*row), rows):
            print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
            failed += failures
    print(f"{f'{failed} cases FAILED' if failed else 'All is well'}, {time.monotonic() - began:.0f} s.")
    return not failed


def check_row(device: torch.device, op: str, backend: str, dtype: torch.dtype) -> tuple[list[str], int]:
    """Run the cases that the back end serves. Returns the lines to print, one more for each failure, and how many failed."""
    reason = why_not(op, backend, device)
    if reason is not None:
        return [ROW.format(op, backend, "", "", "", "", f"not available: {reason}")] if dtype == ALL[0] else [], 0
    began = time.monotonic()
    worst, count, reasons = 0.0, 0, []
    for case in cases(interpreted=backend == "triton" and device.type == "cpu"):
        K = case.arguments.get("K", 64)
        refused = why_not(op, backend, device, dtype, K=K, E=case.arguments.get("E", K))
        if case.op != op or dtype not in case.dtypes or refused:
            continue
        count += 1
        try:
            worst = max(worst, JUDGES[op](backend, device, dtype, **case.arguments))
        except Exception as error:  # a check reports anything that goes wrong in a back end
            what = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            reasons.append(f"  {', '.join(f'{name}={value}' for name, value in case.arguments.items())}: {what}")
    if count == 0:
        return [], 0
    result = f"FAILED, {len(reasons)} of {count}:" if reasons else "ok"
    shown = (str(dtype).removeprefix("torch."), count, ">1" if reasons else f"{worst:.2f}", f"{time.monotonic() - began:.1f}")
    return [ROW.format(op, backend, *shown, result), *reasons], len(reasons)


@contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that an element that a kernel forgets to write is noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
