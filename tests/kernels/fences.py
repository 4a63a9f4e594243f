"""Reads from PTX whether products and copies see what was stored in shared memory.

They read and write by another path than loads and stores do, the async proxy. Between a store and what reads it, or writes over
it, there must be ``fence.proxy.async``, and then a barrier, as other threads store too.
"""

from __future__ import annotations

import re

DEFINED = re.compile(r"^\s*(?:@!?%\w+ )?(mov|add|mad|or|bfe|cvt)\.[\w.]+\s+(%\w+), ([^;]*);", re.M)
STORE = re.compile(r"(?:st\.shared|stmatrix)[\w.:]*\s+\[(\w+|%\w+)(?:\+(\d+))?\]")
ASYNC = re.compile(
    r"(?:cp\.async\.bulk\.tensor[\w.:]*\s+\[(%\w+)\]|wgmma\.mma_async[\w.]*\s+\{[^}]*\}, (\{[^}]*\}|%\w+), (%\w+))"
)
FENCE = r"fence\.proxy\.async"
BARRIER = re.compile(r"\b(?:bar|barrier|bar\.warp)\.sync")
HANDED_OVER = re.compile(r"mbarrier\.arrive\.shared|wgmma\.mma_async|cp\.async\.bulk\.tensor|barrier\.sync")  # to partitions


def missing(ptx: str) -> list[str]:
    """Instructions that hand over what was stored without a fence and a barrier. The code is read in the order of its lines."""
    places = Places(ptx)
    shared_with_async = {place for x in ASYNC.finditer(ptx) for name in x.groups() if name for place in places.of(name)}
    found, state = [], "clean"
    for line in ptx.splitlines():
        if store := STORE.search(line):
            offset = int(store[2] or 0)
            if {place + offset for place in places.of(store[1])} & shared_with_async:
                state = "stored"
        elif "mbarrier.init" in line:
            state = "stored"
        elif re.search(FENCE, line):
            state = "fenced" if state == "stored" else state
        elif state == "fenced" and BARRIER.search(line):
            state = "clean"
        elif state != "clean" and HANDED_OVER.search(line):
            found.append(line.strip())
            state = "clean"
    return found


def missing_without(ptx: str) -> list[int]:
    """How many more are missing if one of the fences is left out, for each in turn."""
    found, fences = len(missing(ptx)), re.finditer(FENCE, ptx)
    return [len(missing(ptx[: x.start()] + ptx[x.end() :])) - found for x in fences]


class Places:
    """The constant part of addresses in shared memory, and of the descriptors of products."""

    def __init__(self, ptx: str) -> None:
        self.defined: dict[str, list[tuple[str, list[str]]]] = {}
        for name, register, operands in DEFINED.findall(ptx):
            self.defined.setdefault(register, []).append((name, operands.split(", ")))

    def of(self, register: str, seen: frozenset[str] = frozenset()) -> set[int]:
        """All that it may be; empty if it is no such address."""
        if register == "global_smem":
            return {0}
        found: set[int] = set()
        for name, operands in self.defined.get(register, ()) if register not in seen else ():
            more = sum(int(x) for x in operands if name == "add" and re.fullmatch(r"-?\d+", x))
            for operand in operands:
                found |= {place + more for place in self.of(operand, seen | {register})}
        return found
