"""``python -m quietstar_kernels check``: every op on every back end of a device, compared with plain PyTorch in fp64."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from quietstar_kernels import _cases, _dispatch
from quietstar_kernels._checks import check_instance
from quietstar_kernels.layout import ThoughtLayout

__all__ = ["check", "served"]

ALL = (torch.float32, torch.float16, torch.bfloat16)
WORKERS = {"cuda": 8}  # rows at a time: on a GPU nearly all the time is spent compiling
ROW = "{:<18} {:<10} {:<9} {:>5} {:>6} {:>8}  {}"


@dataclass(frozen=True)
class Case:
    """Arguments of one of ``_cases.JUDGES``, and the dtypes to run it in, if the back end serves them."""

    op: str
    dtypes: tuple[torch.dtype, ...]
    arguments: dict[str, Any]


def cases(interpreted: bool) -> list[Case]:
    """Few dtypes, widths and options, each of which a kernel is compiled for, in several layouts.

    Args:
        interpreted: make them smaller, for Triton's interpreter.
    """
    short, long, vocabulary = (16, 40, 300) if interpreted else (48, 400, 5003)
    every, anchors, ragged = layouts = every_position(short), _cases.chosen_anchors(long), ragged_thoughts(short)
    everything = {"groups": 4, "K": 128, "window": long // 3, "softcap": 20.0, "sinks": True}
    odd = {"heads": 3, "groups": 1, "K": 40, "E": 24}
    found = []
    for op in ("thought_attention", "thought_decode"):
        found += [Case(op, ALL, {"layout": layout}) for layout in (*layouts, branches(long))]
        found += [Case(op, (torch.float32, torch.bfloat16), {"layout": layout, **everything}) for layout in (every, anchors)]
        found += [Case(op, (torch.float16,), {"layout": ragged, **odd})]
    found += [Case("thought_attention", (torch.float32, torch.bfloat16), {"layout": branches(long, own="full")})]
    options = {"vocabulary": vocabulary, "temperature": 0.7, "scale": 0.5, "softcap": 8.0, "banned": (3, 77)}
    for op in ("sample_token", "linear_logprob"):
        found += [Case(op, ALL, {"vocabulary": vocabulary}), Case(op, (torch.float32, torch.bfloat16), options)]
    return found + [Case("sample_token", ALL, {"vocabulary": vocabulary, "temperature": 0.0})]


def every_position(text: int) -> ThoughtLayout:
    return ThoughtLayout.every_position(1, text, thoughts=2, rows=3)


def ragged_thoughts(text: int) -> ThoughtLayout:
    """Thoughts of 0 to 5 rows."""
    length = torch.arange(text * 2).view(1, text, 2) % 6
    return ThoughtLayout.at(torch.arange(text)[None], 2, 5, text_length=text, length=length)


def branches(text: int, own: str = "causal") -> ThoughtLayout:
    """Packed: several on an anchor, from none to as many rows as the text has."""
    anchors = torch.tensor([text // 3, text // 3, text // 2, text - 1, text - 1])[None]
    return ThoughtLayout.packed(anchors, torch.tensor([1, text // 2, 0, text, 7])[None], text, own=own)


def served(device: torch.device) -> tuple[str, ...]:
    """The reference, and what ``auto`` may take on ``device``."""
    check_instance("served", "device", device, torch.device)
    return ("reference", *_dispatch.FASTEST_FIRST.get(device.type, ()))


def check(device: torch.device, backends: Sequence[str], ops: Sequence[str]) -> bool:
    """Print a table with a row for each op, back end and dtype. True if all results are right."""
    print(ROW.format("op", "back end", "dtype", "cases", "worst", "seconds", "result (worst: error over what is allowed)"))
    began = time.monotonic()
    rows = [(device, op, backend, dtype) for op in ops for backend in backends for dtype in ALL]
    failed = 0
    with nan_in_new_tensors(), ThreadPoolExecutor(WORKERS.get(device.type, 1)) as pool:
        for lines, failures in pool.map(lambda row: check_row(*row), rows):
            print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
            failed += failures
    print(f"{f'{failed} cases FAILED' if failed else 'All is well'}, {time.monotonic() - began:.0f} s.")
    return not failed


def check_row(device: torch.device, op: str, backend: str, dtype: torch.dtype) -> tuple[list[str], int]:
    """Run the cases that the back end serves. Returns the lines to print, one more for each failure, and how many failed."""
    reason = _dispatch.why_not(op, backend, device)
    if reason is not None:
        return [ROW.format(op, backend, "", "", "", "", f"not available: {reason}")] if dtype == ALL[0] else [], 0
    began = time.monotonic()
    worst, count, reasons = 0.0, 0, []
    for case in cases(interpreted=backend == "triton" and device.type == "cpu"):
        K = case.arguments.get("K", 64)
        refused = _dispatch.why_not(op, backend, device, dtype, K=K, E=case.arguments.get("E", K))
        if case.op != op or dtype not in case.dtypes or refused:
            continue
        count += 1
        try:
            worst = max(worst, _cases.JUDGES[op](backend, device, dtype, **case.arguments))
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
