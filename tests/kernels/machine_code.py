"""Reads the loops of a kernel from an NVIDIA disassembly: what waits for what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z0-9][A-Za-z0-9_.]*)([^;]*);", re.M)


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    operands: str

    @property
    def mnemonic(self) -> str:
        return self.name.split(".")[0]


@dataclass
class Loop:
    """An innermost loop with matrix products.

    Attributes:
        serialised: products of warp groups that wait for the one before, though both add to the same registers.
        in_flight: copies of later iterations that are still on their way when the first product starts; None without copies.
        ordered: after a wait for copies, which each thread does for its own, a barrier comes before shared memory is read.
        barriers: of all threads of the program; group_barriers, of some.
    """

    serialised: int
    in_flight: int | None
    ordered: bool
    instructions: int
    products: int
    barriers: int
    group_barriers: int


def instructions(sass: str) -> list[Instruction]:
    return [Instruction(int(address, 16), name, operands) for address, name, operands in INSTRUCTION.findall(sass)]


def loops(code: list[Instruction]) -> list[Loop]:
    """In the order of their addresses."""
    index = {x.address: i for i, x in enumerate(code)}
    jumps = set()
    for i, x in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", x.operands) if x.mnemonic == "BRA" else None
        if target and index.get(int(target[1], 16), i) < i:
            jumps.add((index[int(target[1], 16)], i))
    found, end = [], 0  # of the loop before
    for first, last in sorted(jumps):
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in jumps)
        if not inner and any(x.mnemonic in ("HGMMA", "HMMA") for x in code[first : last + 1]):
            found.append(_loop(code[first : last + 1], code[end:first]))
            end = last + 1
    return found


def _loop(body: list[Instruction], before: list[Instruction]) -> Loop:
    serialised, sums, waited = 0, None, False
    for x in body:
        if x.name.startswith("WARPGROUP.DEPBAR"):
            waited = x.operands.rstrip().endswith("0x0")
        elif x.mnemonic == "HGMMA":
            into, *rest = (operand.strip() for operand in x.operands.split(","))
            serialised += waited and into == sums and into in rest  # otherwise it starts a new sum
            sums, waited = into, False
    products = sum(x.mnemonic in ("HGMMA", "HMMA") for x in body)
    of_group = ["," in x.operands for x in body if x.name.startswith("BAR.SYNC")]
    counts = len(body), products, of_group.count(False), of_group.count(True)
    return Loop(serialised, _in_flight(body, before), _ordered(body), *counts)


def _in_flight(body: list[Instruction], before: list[Instruction]) -> int | None:
    """By what waits for copies leave open, or for whole tiles by how many iterations' copies were started before the loop."""
    count = lambda code, name: sum(x.mnemonic == name for x in code)  # noqa: E731
    if tiles := count(body, "UTMALDG"):
        return count(before, "UTMALDG") // tiles - 1
    if not count(body, "LDGSTS"):
        return None
    for x in body:
        if x.mnemonic == "DEPBAR" and (open_ := re.search(r"0x(\w+)\s*$", x.operands)):
            return int(open_[1], 16)
        if x.mnemonic == "HGMMA":
            break
    return 0


def _ordered(body: list[Instruction]) -> bool:
    waited = False
    for x in body:
        if x.mnemonic == "DEPBAR":
            waited = True
        elif x.name.startswith("BAR.SYNC"):
            waited = False
        elif waited and x.mnemonic in ("LDS", "LDSM", "HGMMA"):
            return False
    return True
