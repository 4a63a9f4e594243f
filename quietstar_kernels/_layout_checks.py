"""Checks the sizes and values of a ``ThoughtLayout``."""

from __future__ import annotations

import torch
from torch import Tensor

from quietstar_kernels._checks import INTEGERS, Checker

OP = "ThoughtLayout"
MOST_ROWS = 2**31 - 1  # kernels number the rows of a text in 32 bits


def check_text(check: Checker, function: str, text_length: int | None, lo: Tensor | None, device: torch.device) -> None:
    """Sets L. ``lo`` is checked if it is the only one that gives it."""
    if text_length is not None:
        check.sizes["L"] = check.integer("text_length", text_length, 0)
    elif lo is None:
        raise check.fail(f"{function}() needs lo or text_length")
    else:
        check.tensor("lo", lo, "B,L", INTEGERS, device)


def check_grid_sizes(check: Checker, thoughts: int, rows: int) -> None:
    """Sets N. Where P is not set, every position is an anchor."""
    N, S = check.integer("thoughts N", thoughts, 1), check.integer("rows S", rows, 1)
    B, L, P = check["B"], check["L"], check.sizes.get("P", check["L"])
    if (M := L + P * N * S) > MOST_ROWS or B * P * N > MOST_ROWS:
        sizes = f"batch B={B:,}, text_length L={L:,}, P={P:,}, thoughts N={N:,}, rows S={S:,}"
        raise check.fail(f"L+P*N*S and B*P*N must be at most {MOST_ROWS:,}, got {M:,} and {B * P * N:,} with {sizes}")
    check.sizes["N"] = N


def check_packed_sizes(check: Checker, C: int, rows: int) -> None:
    B, L = check["B"], check["L"]
    if L + rows > MOST_ROWS or B * C > MOST_ROWS:
        sizes = f"batch B={B:,}, text_length L={L:,}, rows R={rows:,}, C={C:,}"
        raise check.fail(f"L+R and B*C must be at most {MOST_ROWS:,}, got {L + rows:,} and {B * C:,} with {sizes}")


def check_steps(check: Checker, own: str) -> None:
    """For what makes the rows of a thought one after another."""
    if own == "full":
        raise check.fail("layout must have own='causal', got own='full': a step can't see rows that are not there yet")


def check_values(anchor: Tensor, lo: Tensor, length: Tensor, rows: int, packed: bool = False) -> None:
    """Raises ValueError for the first rule that is broken. One device-to-host transfer serves all rules."""
    L = lo.shape[1]
    t = torch.arange(L, device=lo.device)
    later = anchor[:, 1:]
    rules = {
        f"anchors must be from -1 to L-1={L - 1}": (anchor < -1) | (anchor >= L),
        "anchors must ascend, with -1 only at the end": (later != -1) & (later < anchor[:, :-1])
        | (later != -1) & (anchor[:, :-1] == -1),
        "lo must satisfy 0 <= lo[b,t] <= t": (lo < 0) | (lo > t),
    }
    if packed:
        rules |= {
            "lengths must not be negative": length < 0,
            "lengths must be 0 where anchors hold -1": (anchor == -1) & (length > 0),
            f"the sum of lengths must be at most rows R={rows}": length.long().sum(1) > rows,
        }
    else:
        rules[f"length must be from 0 to rows S={rows}"] = (length < 0) | (length > rows)
    broken = torch.stack([rule.any() for rule in rules.values()]).tolist()
    tensors = (anchor, anchor, lo, length, length, length)[: len(rules)]
    for (rule, where), is_broken, tensor in zip(rules.items(), broken, tensors, strict=True):
        if is_broken:
            place = where.nonzero()[0].tolist()
            raise ValueError(f"{OP}: {rule}, broken at {place} of shape {list(tensor.shape)}")
