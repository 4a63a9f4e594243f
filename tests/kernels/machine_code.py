"""Reads the loops of a kernel from an NVIDIA disassembly: what an iteration issues, and what waits for what."""

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
        instructions: of one iteration, for a warp.
        hgmma: products of warp groups among them.
        serialised: products that wait for the one before, though both add to the same registers.
        in_flight: copies of later iterations that are still on their way when the first product starts; None without copies.
        multiplications: of matrices, by a warp.
        shared: bytes that a warp, or its share of a warp group, reads from and writes to shared memory; copies don't count.
        exponentials: and other approximations, of a warp; 32 each.
        stops: barriers of all warps, and waits for products or copies.
        ordered: after a wait for copies, which each thread does for its own, a barrier comes before shared memory is read.
    """

    instructions: int
    hgmma: int
    serialised: int
    in_flight: int | None
    multiplications: int
    shared: int
    exponentials: int
    stops: int
    ordered: bool


def instructions(sass: str) -> list[Instruction]:
    return [Instruction(int(address, 16), name, operands) for address, name, operands in INSTRUCTION.findall(sass)]


def loops(code: list[Instruction]) -> list[Loop]:
    """In the order of their addresses."""
    return [_loop(code[first : last + 1], code[end:first]) for end, first, last in spans(code)]


def spans(code: list[Instruction]) -> list[tuple[int, int, int]]:
    """(end of the loop before, first, last) index of each innermost loop with matrix products."""
    index = {x.address: i for i, x in enumerate(code)}
    jumps = set()
    for i, x in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", x.operands) if x.mnemonic == "BRA" else None
        if target and index.get(int(target[1], 16), i) < i:
            jumps.add((index[int(target[1], 16)], i))
    found, end = [], 0
    for first, last in sorted(jumps):
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in jumps)
        if not inner and any(x.mnemonic in ("HGMMA", "HMMA") for x in code[first : last + 1]):
            found.append((end, first, last))
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
    count = lambda code, name: sum(x.mnemonic == name for x in code)  # noqa: E731
    multiplications, shared = map(sum, zip(*map(_work, body), strict=True))
    stops = sum(x.name.startswith(("BAR.SYNC", "WARPGROUP.DEPBAR", "DEPBAR", "SYNCS.PHASECHK")) for x in body)
    in_flight = _in_flight(body, before, count)
    units = multiplications, shared, count(body, "MUFU"), stops
    return Loop(len(body), count(body, "HGMMA"), serialised, in_flight, *units, _ordered(body))


def _work(x: Instruction) -> tuple[int, int]:
    """(multiplications, bytes of shared memory) of a warp. A product's second factor is in shared memory, the first may be."""
    sizes = re.search(r"\.(\d+)x(\d+)x(\d+)\.", x.name)
    if x.mnemonic == "HGMMA" and sizes:
        m, n, k = map(int, sizes.groups())
        first = x.operands.split(",")[1].strip().startswith("gdesc")
        return m * n * k // 4, 2 * k * (n + m * first) // 4
    if x.mnemonic == "HMMA":
        return 16 * 8 * int(re.search(r"HMMA\.168(\d+)", x.name)[1]), 0
    if x.mnemonic in ("LDSM", "STSM"):
        return 0, 128 * int(x.name[-1])
    if x.mnemonic in ("LDS", "STS"):
        width = re.search(r"\.(\d+)$", x.name)
        return 0, 32 * (int(width[1]) // 8 if width else 4)
    return 0, 0


def _in_flight(body: list[Instruction], before: list[Instruction], count) -> int | None:
    """By what waits for copies leave open, or for whole tiles by how many iterations' copies were started before the loop."""
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
