"""Time tiles of attention and decoding on this GPU: those of ``configs.py`` and others, the fastest first.

    python -m benchmarks.gpu.tiles forward "text keys" --seconds 120

Processes compile the tiles, all cores at once, and what they have compiled is timed meanwhile. A tile whose results differ from
those of ``configs.py`` is reported as wrong. Heads are in bf16; two thoughts of 14 rows are at every position.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from multiprocessing import active_children, get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.candidate import gluon
from quietstar_kernels import ThoughtLayout
from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.triton import _launch, configs, gluon_why_not_on
from quietstar_kernels.triton.configs import Config, Table
from quietstar_kernels.triton.thought_attention import backward, backward_keys, launch_forward
from quietstar_kernels.triton.thought_decode import thought_decode

SIZES = [(8, 256), (4, 512), (2, 1024), (1, 2048)]  # batch rows, text
N, S, H, G, STEP = 2, 14, 32, 8, 12
REPEATS = 5
BEST = 12  # rows to print
TABLES, SHARED = 9 << 10, 227 << 10  # bytes
Call = Callable[[], tuple[Tensor, ...]]


def tensors(B: int, L: int, width: int, device: str) -> tuple[Any, list[Tensor], AttentionOptions]:
    layout = ThoughtLayout.every_position(B, L, N, S, "cpu")
    branches = layout.branches
    branches = branches._replace(**{name: getattr(branches, name).to(device) for name in ("lo", "table", "of_row")})
    torch.manual_seed(0)
    qkv = [torch.randn(B, heads, layout.M, width, dtype=torch.bfloat16, device=device) for heads in (H, G, G)]
    return branches, qkv, AttentionOptions(width**-0.5, None, None, None)


def forward(B: int, L: int, width: int, device: str) -> Call:
    branches, qkv, options = tensors(B, L, width, device)
    return lambda: launch_forward(*qkv, branches, options)


def forward_in_gluon(B: int, L: int, width: int, device: str) -> Call:
    call = forward(B, L, width, device)

    def called() -> tuple[Tensor, ...]:
        with gluon():
            return call()

    return called


def gradients(name: str) -> Callable[[int, int, int, str], Call]:
    def make(B: int, L: int, width: int, device: str) -> Call:
        branches, qkv, options = tensors(B, L, width, device)
        out, lse = launch_forward(*qkv, branches, options)
        grad_out = torch.randn_like(out)

        def call() -> tuple[Tensor, ...]:
            known = _launch.plan("tiles", (grad_out, *qkv), name)
            given = branches, branches.contiguous()
            tables = known.once("tables", lambda: backward.row_tables(grad_out, out, lse, None, *given, None, None, known))
            inputs = backward.Inputs(grad_out, *qkv, *given, options, tables, known, name.endswith("in Gluon"))
            return (backward.query_gradient(inputs),) if name == "dq" else backward_keys.key_gradients(inputs)

        return call

    return make


def decode(B: int, L: int, width: int, device: str) -> Call:
    branches, (q, k, v), options = tensors(B, L, width, device)
    C = branches.table.shape[1]
    q = q[:, :, L : L + C].contiguous()
    own = [x[:, :, L:].reshape(B, G, C, S, width) for x in (k, v)]
    step = torch.tensor(STEP, device=device)
    texts = [x[:, :, :L].contiguous() for x in (k, v)]
    return lambda: (thought_decode(q, *texts, *own, branches.lo, branches.table, step, options),)


def tiles(rows: list[int], columns: list[int], edges: list[int], stages: list[int], names: tuple[str, str]) -> list[Config]:
    """With as many registers as the compiler likes, and with so many that one more program fits on a multiprocessor."""
    found = []
    for M, N, edge, warps, depth in itertools.product(rows, columns, edges, (4, 8), stages):
        if edge <= N and M >= 16 * warps:
            blocks = {names[0]: M, names[1]: N, "SLICES": 1} | ({"BLOCK_EDGE": edge} if edge else {})
            found += [Config(blocks, warps, depth, maxnreg=most) for most in (None, {4: 168, 8: 128}[warps])]
    return found


def small_tiles() -> list[Config]:
    """Of a branch or two, as own keys beside Gluon have them."""
    found = itertools.product((16, 32), (16, 32), (1, 2, 4), (2, 3))
    return [Config({"BLOCK_N": N, "BLOCK_M": M, "SLICES": 1}, warps, stages) for N, M, warps, stages in found]


def gluon_tiles() -> list[Config]:
    found = itertools.product((64, 128), (32, 64), (2, 3, 4))
    return [Config({"BLOCK_N": N, "BLOCK_EDGE": edge, "STAGES": stages}, maxnreg=168) for N, edge, stages in found]


def fits(config: Config, width: int) -> bool:
    """Whether shared memory holds a tile in Gluon: a ring of keys and values, two tiles of queries, keys at an edge, tables."""
    N, edge, stages = (config.blocks.get(name, 0) for name in ("BLOCK_N", "BLOCK_EDGE", "STAGES"))
    return not stages or 2 * width * (2 * stages * N + 4 * 64 + 2 * edge) + TABLES <= SHARED


QUERIES, KEYS = ("BLOCK_M", "BLOCK_N"), ("BLOCK_N", "BLOCK_M")
# By kernel: the tables to change, how to call it, other tiles.
KERNELS: dict[str, tuple[list[Table], Callable[[int, int, int, str], Call], list[Config]]] = {
    "forward": (
        [configs.ATTENTION_FORWARD, configs.ATTENTION_FORWARD_LONG],
        forward,
        tiles([64, 128], [32, 64, 128], [16, 32], [2, 3], QUERIES),
    ),
    "forward in Gluon": ([configs.ATTENTION_FORWARD_GLUON], forward_in_gluon, gluon_tiles()),
    "dq": ([configs.ATTENTION_BACKWARD_QUERIES], gradients("dq"), tiles([64, 128], [16, 32, 64], [16, 32], [2, 3], QUERIES)),
    "text keys": (
        [configs.ATTENTION_BACKWARD_TEXT_KEYS],
        gradients("text keys"),
        tiles([64, 128], [16, 32, 64], [0], [2, 3], KEYS),
    ),
    "text keys in Gluon": (
        [configs.ATTENTION_BACKWARD_KEYS_GLUON],
        gradients("text keys in Gluon"),
        [Config({"STAGES": stages}, maxnreg=168) for stages in (2, 3, 4)],
    ),
    "own keys": (
        [configs.ATTENTION_BACKWARD_OWN_KEYS],
        gradients("own keys"),
        small_tiles() + tiles([64, 128], [16, 32], [0], [2, 3], KEYS),
    ),
    "decode": ([configs.THOUGHT_DECODE], decode, tiles([64, 128], [32, 64], [16, 32], [2, 3], QUERIES)),
}


def use(kernel: str, width: int, config: Config) -> None:
    for table in KERNELS[kernel][0]:
        table[configs.target(), 2, width] = config
    configs._picked.clear()
    _launch._plans.clear()


def compile_tile(kernel: str, width: int, index: int) -> None:
    use(kernel, width, KERNELS[kernel][2][index])
    for B, L in SIZES:
        with _launch.compiling_at_once():
            KERNELS[kernel][1](B, L, width, "meta")()


def seconds(call: Call) -> float:
    """The shortest of some runs."""
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    return min(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def shown(config: Config) -> str:
    blocks = " ".join(f"{name.removeprefix('BLOCK_')} {size}" for name, size in config.blocks.items() if name != "SLICES")
    most = f", {config.maxnreg} registers" if config.maxnreg else ""
    return f"{blocks}, {config.num_warps} warps, {config.num_stages} stages{most}"


def time_kernel(kernel: str, width: int, pool: ProcessPoolExecutor, deadline: float) -> list[dict[str, Any]]:
    usual = configs.pick(KERNELS[kernel][0], 2, width)
    calls = [KERNELS[kernel][1](B, L, width, "cuda") for B, L in SIZES]
    truths = [[x.float() for x in call()] for call in calls]
    rows = [{"tile": f"now: {shown(usual)}", "seconds": [seconds(call) for call in calls], "note": ""}]
    fitting = [i for i, config in enumerate(KERNELS[kernel][2]) if fits(config, width)]
    waiting = {pool.submit(compile_tile, kernel, width, i): i for i in fitting}
    try:
        for done in as_completed(waiting, timeout=max(1.0, deadline - time.monotonic())):
            config, took, note = KERNELS[kernel][2][waiting[done]], [float("inf")] * len(SIZES), ""
            try:
                done.result()
                use(kernel, width, config)
                for i, (call, truth) in enumerate(zip(calls, truths, strict=True)):
                    off = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(call(), truth, strict=True))
                    note += f" wrong by {off:.2g}" if not off < 0.02 else ""
                    took[i] = seconds(call)
            except Exception as error:
                note = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.append({"tile": shown(config), "seconds": took, "note": note})
    except TimeoutError:
        print(f"{kernel}: out of time", flush=True)
        for job in waiting:
            job.cancel()
    use(kernel, width, usual)
    return sorted(rows, key=lambda row: sum(a / b for a, b in zip(row["seconds"], rows[0]["seconds"], strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", default=[*KERNELS], metavar="KERNEL", help=", ".join(KERNELS))
    parser.add_argument("--width", type=int, default=128, help="of heads, default 128")
    parser.add_argument("--seconds", type=float, default=60, help="for each kernel, default 60")
    args = parser.parse_args()
    if unknown := set(args.kernels) - set(KERNELS):
        parser.error(f"no {', '.join(sorted(unknown))}; choose from {', '.join(KERNELS)}")
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    for kernel in args.kernels:
        if "Gluon" in kernel and (reason := gluon_why_not_on(torch.device("cuda"), torch.bfloat16, args.width)):
            print(f"{kernel}: not run: {reason}")
            continue
        rows = time_kernel(kernel, args.width, pool, time.monotonic() + args.seconds)
        print(f"\n{kernel}, width {args.width}: µs with B, L = {SIZES}; {len(rows)} of {len(KERNELS[kernel][2]) + 1} tiles")
        for row in rows[:BEST] + [row for row in rows[BEST:] if row["tile"].startswith("now")]:
            print("  ".join(f"{1e6 * x:8.0f}" for x in row["seconds"]), row["tile"], row["note"], flush=True)
    for process in active_children():
        process.kill()  # some may still compile


if __name__ == "__main__":
    main()
