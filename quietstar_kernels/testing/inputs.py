"""Random inputs of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quietstar_kernels._checks import FLOATS, Checker, dtype_names
from quietstar_kernels._typed import typed
from quietstar_kernels.layout import ThoughtLayout

MOST = 2**28  # numbers in a tensor


@typed
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
    check = Checker("attention_inputs")
    check.choice("query_rows", query_rows, ("all", "thoughts"))
    _check_heads(check, heads=heads, groups=groups, width=width, value_width=value_width, dtype=dtype)
    rows = layout.M if query_rows == "all" else layout.R
    sizes = {"q": (heads, rows, width), "k": (groups, layout.M, width)}
    sizes["v"] = (groups, layout.M, value_width or width)
    inputs = {name: _heads(generator, layout, *size, strided, dtype) for name, size in sizes.items()}
    return inputs | {"sinks": _sinks(generator, layout, heads, strided, dtype) if sinks else None}


@typed
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
    _check_heads(Checker("decode_inputs"), heads=heads, groups=groups, width=width, value_width=value_width, dtype=dtype)
    thoughts, S = layout.P * layout.N, layout.S
    value_width = value_width or width
    sizes = {"q": (heads, thoughts, width), "k_text": (groups, layout.L, width), "v_text": (groups, layout.L, value_width)}
    sizes |= {"k_own": (groups, thoughts * S, width), "v_own": (groups, thoughts * S, value_width)}
    inputs = {name: _heads(generator, layout, *size, strided, dtype) for name, size in sizes.items()}
    inputs = {name: x.unflatten(2, (thoughts, S)) if "own" in name else x for name, x in inputs.items()}
    return inputs | {"sinks": _sinks(generator, layout, heads, strided, dtype) if sinks else None}


@typed
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
    device = _check_head("sample_inputs", rows=rows, width=width, vocabulary=vocabulary, dtype=dtype, device=device)
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


@typed
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
    device = _check_head("logprob_inputs", rows=rows, width=width, vocabulary=vocabulary, dtype=dtype, device=device)
    if len(set(banned)) >= vocabulary:
        raise ValueError(f"logprob_inputs: banned must leave at least one of the {vocabulary} ids, got {len(set(banned))}")
    inputs = sample_inputs(generator, rows, width, vocabulary, bias, dtype, device)
    del inputs["counters"]
    allowed = torch.tensor([i for i in range(vocabulary) if i not in banned])
    targets = allowed[torch.randint(0, len(allowed), (rows,), generator=generator)]
    ignored = torch.randint(0, 6, (rows,), generator=generator) == 0
    return inputs | {"targets": targets.masked_fill(ignored, -100).to(device)}


def _check_heads(check: Checker, heads: int, groups: int, width: int, value_width: int | None, dtype: torch.dtype) -> None:
    for name, size in {"heads": heads, "groups": groups}.items():
        check.integer(name, size, 0, 1024)
    for name, size in {"width": width, "value_width": width if value_width is None else value_width}.items():
        check.integer(name, size, 0, 256)
    _check_dtype(check, dtype)


def _check_head(
    op: str, rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device | str | None
) -> torch.device | None:
    check = Checker(op)
    check.integer("rows", rows, 0)
    check.integer("width", width, 1)
    check.integer("vocabulary", vocabulary, 1)
    if width * max(rows, vocabulary) > MOST:
        raise check.fail(
            f"width times rows or vocabulary must be at most {MOST:,}, got {width:,} times {max(rows, vocabulary):,}"
        )
    _check_dtype(check, dtype)
    return None if device is None else check.device(device)


def _check_dtype(check: Checker, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise check.fail(f"dtype must be {dtype_names(FLOATS)}, got {dtype_names([dtype])}")


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
