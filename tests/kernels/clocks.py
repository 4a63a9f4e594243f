"""The clocks that the kernels of thought_attention and thought_decode should take on an H100: a model, no measurement.

It reads the loops of the compiled kernels (``machine_code.py``), counts for a layout how often each runs, and gives two bounds:

- overlapped: the unit of a multiprocessor with the most to do, if all others work behind it. Units issue instructions,
  multiply, read and write shared memory, compute exponentials, read from L2 and from memory;
- serial: what a program does in turn, divided by the programs that share a multiprocessor. In a turn of a loop these are the
  products, then the softmax between them, then stops (barriers, and waits for products). Outside of the loops, loads that wait
  for each other.

The larger of both is predicted, as the share of what products, or memory in decoding, must take. Two thoughts of 14 rows are at
every position of a text; heads are 128 wide, in bf16. The H100 is full: neither the last wave nor the launch is counted.

    python tests/kernels/clocks.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    sys.path.insert(0, str(Path(__file__).parents[2]))

import machine_code  # noqa: E402
import torch  # noqa: E402
from ahead_of_time import compiled_for, disassembly, resources  # noqa: E402
from compiled import thought_attention, thought_decode  # noqa: E402
from torch import Tensor  # noqa: E402

from quietstar_kernels.triton import _launch, configs  # noqa: E402
from quietstar_kernels.triton._launch import cdiv  # noqa: E402
from quietstar_kernels.triton.configs import Config, Table  # noqa: E402

N, S, WIDTH, STEP = 2, 14, 128, 12  # thoughts of a position, their rows, the width of heads, the step of decoding
KEY = "sm_90", 2, WIDTH
ROW = 2 * WIDTH * 2  # bytes of a key and a value, or of a query and a gradient

# An H100 SXM, a clock and multiprocessor: 989 TFLOP/s and 3.35 TB/s by its data sheet. By public microbenchmarks 5.5 TB/s come
# out of L2, a barrier or a wait takes about 30 clocks, a load from L2 or memory 300 to 800, and mma.sync has 62 % of wgmma.
GHZ, PROCESSORS = 1.755, 132
MULTIPLICATIONS, OF_MMA_SYNC = 2048, 0.62
SHARED, EXPONENTIALS = 128, 16
L2, MEMORY = (x * 1e3 / GHZ / PROCESSORS for x in (5.5, 3.35))
STOP, LOAD = 32, 600
# Loads before the first product that wait for the one before: tables of the rows, then queries, then keys.
LOADS = {
    "attention_forward": 4,
    "attention_backward_queries": 3,
    "attention_backward_text_keys": 3,
    "attention_backward_own_keys": 4,
    "_decode": 3,
}


@dataclass
class Turn:
    """Clocks of one turn of a loop by one program, by unit, and of all in turn."""

    units: dict[str, float]
    serial: float


@dataclass
class Code:
    """A compiled kernel: its tiles, its loops, how many programs share a multiprocessor, and clocks outside of the loops."""

    blocks: dict[str, int]
    loops: list[Turn]
    residents: int
    fixed: Turn


def compiled(name: str, config: Config, table: Table, launch: Callable[[], object]) -> Code:
    """Kernel ``name`` of a ``launch`` with ``config`` in the place of the table's entry for heads of 128 on sm_90."""
    usual, table[KEY] = table[KEY], config
    _launch._plans.clear()
    try:
        with compiled_for("sm_90") as kernels:
            launch()
    finally:
        table[KEY] = usual
    (kernel,) = (x for x in kernels if x.metadata.name == name)
    takes, code = resources(kernel), machine_code.instructions(disassembly(kernel))
    found, spans = machine_code.loops(code), machine_code.spans(code)
    rows = ["BLOCK_M"] if name.endswith("keys") else ["BLOCK_EDGE"] * (1 + (name == "_decode")) + ["BLOCK_N"]
    warps = config.num_warps
    turns = [turn(loop, warps, config.blocks[block]) for loop, block in zip(found, rows, strict=False)]
    # The loops after these are for values that aren't finite, with all that is between.
    end, again = spans[len(rows) - 1][2], spans[-1][2]
    outside = end + len(code) - again - sum(x.instructions for x in found[: len(rows)])
    # A multiprocessor has 228 KB of shared memory, of which a program takes one for itself, 64 Ki registers and 64 warps.
    residents = min(233472 // (takes.shared + 1024), 65536 // (-(-takes.registers // 8) * 8 * 32 * warps), 64 // warps)
    issue = outside * warps / 4
    return Code(config.blocks, turns, residents, Turn({"issue": issue}, issue + LOADS[name] * LOAD))


def turn(loop: machine_code.Loop, warps: int, rows: int) -> Turn:
    """Of a loop that copies ``rows`` rows of two tensors in a turn."""
    wide = 1.0 if loop.hgmma else OF_MMA_SYNC
    read = loop.shared * warps / SHARED
    units = {
        "issue": loop.instructions * warps / 4,
        "multiply": loop.multiplications * warps / MULTIPLICATIONS / wide,
        "shared": read + rows * ROW / SHARED,
        "exponentials": loop.exponentials * warps * 32 / EXPONENTIALS,
        "L2": rows * ROW / L2,
    }
    between = max(units["issue"], units["exponentials"])
    copies = LOAD * (loop.in_flight == 0)  # else they are on their way during the turn before
    return Turn(units, max(units["multiply"], read) + between + loop.stops * STOP + copies)


def cover(start: Tensor, all_from: Tensor, all_to: Tensor, final: Tensor, blocks: dict[str, int]) -> tuple[Tensor, Tensor]:
    """(masked, whole) blocks of each tile, as ``_device.cover``."""
    before = cdiv((all_from - start).clamp(min=0), blocks["BLOCK_EDGE"])
    begin = start + before * blocks["BLOCK_EDGE"]
    full = (all_to + 1 - begin).clamp(min=0) // blocks["BLOCK_N"]
    return before + cdiv((final + 1 - begin - full * blocks["BLOCK_N"]).clamp(min=0), blocks["BLOCK_EDGE"]), full


def ends(count: int, group: int, block: int) -> tuple[Tensor, Tensor]:
    """First and last row of each tile of ``count`` rows with ``group`` heads."""
    first = torch.arange(cdiv(count * group, block)) * block
    return first // group, ((first + block - 1) // group).clamp(max=count - 1)


def turns_of_queries(L: int, group: int, blocks: dict[str, int]) -> list[Tensor]:
    """How often each loop of the forward or of dq runs, by tile."""
    first, last = ends(L * N * S, group, blocks["BLOCK_M"])
    zero = torch.zeros_like(first)
    own_masked, own_full = cover(first // S * S, last // S * S, first, last, blocks)
    masked, full = cover(zero, zero, first // (N * S), last // (N * S), blocks)
    first, last = ends(L, group, blocks["BLOCK_M"])
    of_text = cover(torch.zeros_like(first), torch.zeros_like(first), first, last, blocks)
    return [torch.cat([own_masked + masked, of_text[0]]), torch.cat([own_full + full, of_text[1]])]


def turns_of_text_keys(L: int, group: int, blocks: dict[str, int]) -> list[Tensor]:
    n = torch.arange(0, L, blocks["BLOCK_N"])
    return [group * (cdiv(L - n, blocks["BLOCK_M"]) + cdiv((L - n) * N * S, blocks["BLOCK_M"]))]


def turns_of_own_keys(L: int, group: int, blocks: dict[str, int]) -> list[Tensor]:
    r = torch.arange(0, L * N * S, blocks["BLOCK_N"])
    last = (r + blocks["BLOCK_N"] - 1).clamp(max=L * N * S - 1)
    return [group * cdiv((last // S + 1) * S - r, blocks["BLOCK_M"])]


def turns_of_decode(L: int, group: int, blocks: dict[str, int]) -> list[Tensor]:
    first, last = ends(L * N, group, blocks["BLOCK_M"])
    zero = torch.zeros_like(first)
    masked, full = cover(zero, zero, first // N, last // N, blocks)
    return [cdiv((last + 1 - first) * (STEP + 1), blocks["BLOCK_EDGE"]), masked, full]


def bounds(code: Code, turns: list[Tensor], memory: float = 0) -> dict[str, float]:
    """Clocks of one multiprocessor for all programs, by unit and serial, if loop i of each runs turns[i] times."""
    times = [float(x.sum()) for x in turns]
    programs = turns[0].numel()
    units = {unit: sum(n * loop.units[unit] for n, loop in zip(times, code.loops, strict=True)) for unit in code.loops[0].units}
    units["issue"] += programs * code.fixed.units["issue"]
    serial = programs * code.fixed.serial + sum(n * loop.serial for n, loop in zip(times, code.loops, strict=True))
    return units | {"memory": memory / MEMORY, "serial": serial / code.residents}


def case(L: int, group: int) -> tuple:
    return torch.bfloat16, (WIDTH, WIDTH), (None, None, False), 1, L, L * N, S, 8, group


def decode(L: int, group: int) -> None:
    options = None, None, False
    thought_decode.decode(torch.bfloat16, WIDTH, WIDTH, options, L=L, C=L * N, S=S, groups=8, heads=group)


# name of the kernel, its table, what launches it, turns of its loops
FORWARD = "attention_forward", lambda *sizes: thought_attention.forward(*case(*sizes)), turns_of_queries
BACKWARD = lambda *sizes: thought_attention.backward(*case(*sizes))  # noqa: E731
OPS = {
    "forward": [(configs.ATTENTION_FORWARD, *FORWARD)],
    "backward": [
        (configs.ATTENTION_BACKWARD_QUERIES, "attention_backward_queries", BACKWARD, turns_of_queries),
        (configs.ATTENTION_BACKWARD_TEXT_KEYS, "attention_backward_text_keys", BACKWARD, turns_of_text_keys),
        (configs.ATTENTION_BACKWARD_OWN_KEYS, "attention_backward_own_keys", BACKWARD, turns_of_own_keys),
    ],
    "decode": [(configs.THOUGHT_DECODE, "_decode", decode, turns_of_decode)],
}


def least(op: str, L: int, group: int) -> tuple[float, float]:
    """(clocks to multiply what is needed, clocks to read and write it) of a key head; the latter of decoding alone."""
    text, thoughts = L * (L + 1) / 2, L * N
    if "decode" in op:
        numbers = L + thoughts * (STEP + 1 + group)
        return 2 * WIDTH * group * (N * text + thoughts * (STEP + 1)) / MULTIPLICATIONS, numbers * ROW / MEMORY
    products = 5 if op == "backward" else 2
    return products * WIDTH * group * ((N * S + 1) * text + thoughts * S * (S + 1) / 2) / MULTIPLICATIONS, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8], help="H/G")
    options = parser.parse_args()
    print("| op | H/G | L | overlapped | serial | predicted share |\n|---|---|---|---|---|---|")
    for op, kernels in OPS.items():
        codes = [
            compiled(name, table[KEY], table, lambda: launch(256 if "short" in op else 4096, 4))  # noqa: B023, called at once
            for table, name, launch, _ in kernels
        ]
        for group in options.groups:
            for L in options.lengths:
                multiply, memory = least(op, L, group)
                found = [
                    bounds(code, turns(L, group, code.blocks), memory * MEMORY)
                    for code, (*_, turns) in zip(codes, kernels, strict=True)
                ]
                ideal = max(multiply, memory)
                units = [max((x[unit], unit) for unit in x if unit != "serial") for x in found]
                overlapped, serial = sum(clocks for clocks, _ in units), sum(x["serial"] for x in found)
                predicted = sum(max(x.values()) for x in found)
                by = ", ".join(dict.fromkeys(unit for _, unit in units))
                shares = f"{ideal / overlapped:.2f} ({by}) | {ideal / serial:.2f} | {ideal / predicted:.2f}"
                print(f"| {op} | {group} | {L:,} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
