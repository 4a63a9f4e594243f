"""Bytes that the Triton kernels of attention read from a GPU's memory, by a simulated schedule; needs no GPU.

132 programs run at a time, in the order of their numbers, each with a tile of 128 rows; in a step each reads a block of 128.
A cache of 50 MB keeps what was read last, as an H100's does by and large. Heads are 128 wide, in 16 bit; every 16th position
has a thought of 8 rows. Side by side are all pairs of a batch row and a key head; in turns is what the kernels do.

    python -m benchmarks.schedule
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from quietstar_kernels.triton._launch import cdiv, pairs_together
from quietstar_kernels.triton.thought_attention.backward_keys import PARTS, PROGRAMS, TILES

RUNNING, CACHE = 132, 50 << 20
TILE, WIDTH, ITEMSIZE = 128, 2 * 128, 2  # rows; numbers of a row of two tensors
EVERY, ROWS = 16, 8
BLOCK = TILE * WIDTH * ITEMSIZE


@dataclass(frozen=True)
class Shape:
    """Sizes of a call with H/G query heads for each key head."""

    B: int
    G: int
    HG: int
    L: int

    @property
    def R(self) -> int:
        return self.L // EVERY * ROWS


def in_turn(pairs: int, each: int, together: int) -> Iterator[tuple[int, int]]:
    """(pair, turn) of all programs in their order, as ``taking_turns`` in the kernels."""
    for first in range(0, pairs, together):
        among = min(together, pairs - first)
        for i in range(among * each):
            yield first + i % among, i // among


def misses(programs: Iterable[Iterator[object]]) -> int:
    """Bytes read from memory by programs that yield the blocks that they read."""
    cache: OrderedDict[object, None] = OrderedDict()
    waiting, missed = iter(programs), 0
    running = [program for _, program in zip(range(RUNNING), waiting, strict=False)]
    while running:
        still = []
        for program in running:
            block = next(program, None)
            while block is None and (new := next(waiting, None)) is not None:
                program, block = new, next(new, None)
            if block is None:
                continue
            still.append(program)
            if block in cache:
                cache.move_to_end(block)
                continue
            missed += 1
            cache[block] = None
            if len(cache) * BLOCK > CACHE:
                cache.popitem(last=False)
        running = still
    return missed * BLOCK


def queries(shape: Shape, pair: int, turn: int) -> Iterator[object]:
    """Text that a tile of the forward or of dq reads: thoughts first, both from the last."""
    thoughts, texts = cdiv(shape.R * shape.HG, TILE), cdiv(shape.L * shape.HG, TILE)
    if turn < thoughts:
        last = ((thoughts - turn) * TILE - 1) // shape.HG // ROWS * EVERY
    else:
        last = ((thoughts + texts - turn) * TILE - 1) // shape.HG
    for block in range(min(last, shape.L - 1) // TILE + 1):
        yield pair, block


def decode(shape: Shape, pair: int, turn: int) -> Iterator[object]:
    """Text that a tile of thoughts reads for one new row of each."""
    thoughts = shape.L // EVERY
    tiles = cdiv(thoughts * shape.HG, TILE)
    last = ((tiles - turn) * TILE - 1) // shape.HG * EVERY
    for block in range(min(last, shape.L - 1) // TILE + 1):
        yield pair, block


def keys(shape: Shape, parts: int, pair: int, turn: int) -> Iterator[object]:
    """Query rows that a part of a block of text keys reads, of one head after another: text after it, then thoughts there."""
    block, part = turn // parts, turn % parts
    first = shape.L // TILE + block * TILE // EVERY * ROWS // TILE
    tiles = [*range(block, shape.L // TILE), *range(first, (shape.L + shape.R) // TILE)]
    rows = [(h, tile) for h in range(shape.HG) for tile in tiles]
    for row in rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]:
        yield pair, row


def compared(shape: Shape) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, least bytes, bytes with all pairs side by side, bytes in the kernels' order)."""
    pairs, blocks = shape.B * shape.G, cdiv(shape.L, TILE)
    rows = shape.HG * (shape.L + shape.R)
    parts = max(1, min(PARTS, cdiv(PROGRAMS, pairs * blocks), rows // TILE // TILES))
    kinds = {
        "forward, dq": (queries, (), cdiv(shape.R * shape.HG, TILE) + cdiv(shape.L * shape.HG, TILE), shape.L),
        "dK, dV": (keys, (parts,), blocks * parts, rows),
        "decode": (decode, (), cdiv(shape.L // EVERY * shape.HG, TILE), shape.L),
    }
    for kernel, (reads, options, each, length) in kinds.items():
        bytes_of = [
            misses(reads(shape, *options, pair, turn) for pair, turn in in_turn(pairs, each, together))
            for together in (pairs, pairs_together(pairs, length, WIDTH, ITEMSIZE))
        ]
        yield kernel, pairs * length * WIDTH * ITEMSIZE, *bytes_of


def main() -> None:
    print("| kernel | B | G | H | L | least, MB | side by side, MB | in turns, MB |\n|---|---|---|---|---|---|---|---|")
    for G, HG in ((8, 4), (32, 1)):
        for B in (1, 4, 16):
            for L in (256, 2048, 8192):
                for kernel, *bytes_of in compared(Shape(B, G, HG, L)):
                    numbers = " | ".join(f"{x / 2**20:,.0f}" for x in bytes_of)
                    print(f"| {kernel} | {B} | {G} | {G * HG} | {L:,} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
