"""Random inputs of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import ThoughtLayout


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
    generator: torch.Generator, layout: ThoughtLayout, heads: int, rows: int, width: int, strided: bool, dtype: torch.dtype
) -> Tensor:
    """[B,heads,rows,width]."""
    if not strided:
        return _normal(generator, (layout.B, heads, rows, width), dtype, layout.device)
    return _normal(generator, (layout.B, rows, heads, width + 1), dtype, layout.device)[..., 1:].transpose(1, 2)
