"""``python -m quietstar_kernels check``: every op by every back end on this machine's device, against plain PyTorch in fp64."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from quietstar_kernels import _cases, _dispatch
from quietstar_kernels.layout import ThoughtLayout

__all__ = ["check", "served"]

ALL = (torch.float32, torch.float16, torch.bfloat16)
ROW = "{:<18} {:<10} {:<9} {:>5} {:>6} {:>8}  {}"


@dataclass(frozen=True)
class Case:
    """Arguments of one of ``_cases.JUDGES``, and the dtypes in which it is run where the back end computes in them."""

    op: str
    dtypes: tuple[torch.dtype, ...]
    arguments: dict[str, Any]


def cases(interpreted: bool) -> list[Case]:
    """Two kernels of a Triton op differ by dtype, widths and which options there are: few of those, in many layouts each."""
    short, long, vocabulary = (16, 40, 300) if interpreted else (48, 400, 5003)
    every, anchors, ragged = layouts = every_position(short), chosen_anchors(long), ragged_thoughts(short)
    everything = {"groups": 4, "K": 128, "window": long // 3, "softcap": 20.0, "sinks": True}
    odd = {"heads": 3, "groups": 1, "K": 40, "E": 24}
    found = []
    for op in ("thought_attention", "thought_decode"):
        found += [Case(op, ALL, {"layout": layout}) for layout in layouts]
        found += [Case(op, (torch.float32, torch.bfloat16), {"layout": layout, **everything}) for layout in (every, anchors)]
        found += [Case(op, (torch.float16,), {"layout": ragged, **odd})]
    options = {"vocabulary": vocabulary, "temperature": 0.7, "scale": 0.5, "softcap": 8.0, "banned": (3, 77)}
    for op in ("sample_token", "linear_logprob"):
        found += [Case(op, ALL, {"vocabulary": vocabulary}), Case(op, (torch.float32, torch.bfloat16), options)]
    return found + [Case("sample_token", ALL, {"vocabulary": vocabulary, "temperature": 0.0})]


def every_position(text: int) -> ThoughtLayout:
    return ThoughtLayout.every_position(1, text, thoughts=2, rows=3)


def chosen_anchors(text: int) -> ThoughtLayout:
    """Three and four anchors, the second text padded on the left."""
    anchors = torch.tensor([[1, text // 2, text - 1, -1], [text // 4 + 1, text // 3, text // 2, text - 1]])
    return ThoughtLayout.from_padding(torch.arange(text) >= torch.tensor([[0], [text // 4]]), 2, 5, anchors)


def ragged_thoughts(text: int) -> ThoughtLayout:
    """Thoughts of 0 to 5 rows."""
    length = torch.arange(text * 2).view(1, text, 2) % 6
    return ThoughtLayout.at(torch.arange(text)[None], 2, 5, text_length=text, length=length)


def served(device: torch.device) -> tuple[str, ...]:
    """The reference, and what ``auto`` may take on ``device``."""
    return ("reference", *_dispatch.FASTEST_FIRST.get(device.type, ()))


def check(device: torch.device, backends: Sequence[str], ops: Sequence[str]) -> bool:
    """Print a table with a row for each op, back end and dtype; True where nothing is wrong."""
    print(
        ROW.format("op", "back end", "dtype", "cases", "worst", "seconds", "result, worst error over what is allowed before it")
    )
    failed = 0
    began = time.monotonic()
    for op in ops:
        for backend in backends:
            reason = _dispatch.why_not(op, backend, device)
            if reason is not None:
                print(ROW.format(op, backend, "", "", "", "", f"not available: {reason}"))
                continue
            interpreted = backend == "triton" and device.type == "cpu"
            for dtype in ALL:
                todo = [case.arguments for case in cases(interpreted) if case.op == op and dtype in case.dtypes]
                failed += check_row(op, backend, device, dtype, todo)
    print(f"{f'{failed} cases FAILED' if failed else 'All is well'}, {time.monotonic() - began:.0f} s.")
    return not failed


def check_row(op: str, backend: str, device: torch.device, dtype: torch.dtype, todo: Sequence[dict[str, Any]]) -> int:
    """Run the cases that the back end serves and print their row, with a line for each that fails; how many do."""
    began = time.monotonic()
    worst, count, reasons = 0.0, 0, []
    for arguments in todo:
        K = arguments.get("K", 64)
        if _dispatch.why_not(op, backend, device, dtype, K=K, E=arguments.get("E", K)) is not None:
            continue
        count += 1
        try:
            with nan_in_new_tensors():
                worst = max(worst, _cases.JUDGES[op](backend, device, dtype, **arguments))
        except Exception as error:  # whatever goes wrong in a back end is what is looked for
            said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            reasons.append(f"  {', '.join(f'{name}={value}' for name, value in arguments.items())}: {said}")
    if count:
        name, result = str(dtype).removeprefix("torch."), f"FAILED, {len(reasons)} of {count}:" if reasons else "ok"
        shown = ">1" if reasons else f"{worst:.2f}"
        print(
            ROW.format(op, backend, name, count, shown, f"{time.monotonic() - began:.1f}", result),
            *reasons,
            sep="\n",
            flush=True,
        )
    return len(reasons)


@contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """``torch.empty`` gives NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
