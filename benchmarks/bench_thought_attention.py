"""thought_attention on the CPU against what PyTorch offers: SDPA with a dense mask, and compiled FlexAttention.

    python benchmarks/bench_thought_attention.py                      # the shape of the README's table
    python benchmarks/bench_thought_attention.py --length 128 --rows 14

Every position of the text thinks. All candidates get the same fp32 inputs and must agree before any is timed. "useful
GFLOP/s" counts only what the layout makes visible; "memory" is what one call adds to the process.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from harness import add_flags, measure, peak_memory, print_table, versions, write_json
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from quietstar_kernels import ThoughtLayout, thought_attention

OURS, DENSE, FLEX = "thought_attention", "SDPA, dense mask", "FlexAttention, compiled"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    layout = ThoughtLayout.every_position(args.batch, args.length, args.thoughts, args.rows)
    shape = (args.batch, args.heads, layout.M, args.width)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    grad_out = torch.randn(shape)
    L, S = args.length, args.rows
    forward_flops = args.batch * 2 * args.width * args.heads * args.thoughts * S * L * (L + S + 2)
    print(versions())
    print(layout)

    attentions: dict[str, Attention] = {OURS: ours(layout), DENSE: dense(layout)}
    failures = {}
    try:
        attentions[FLEX] = flex(layout)
        attentions[FLEX](q.detach(), k.detach(), v.detach())
    except Exception as error:  # whatever the compiler raises, the table says it
        attentions.pop(FLEX, None)
        failures[FLEX] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"

    def forward(attention: Attention) -> Tensor:
        with torch.no_grad():
            return attention(q.detach(), k.detach(), v.detach())

    def forward_backward(attention: Attention) -> tuple[Tensor, ...]:
        out = attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), grad_out)

    rows = []
    for what, run, flops in (("forward", forward, forward_flops), ("forward+backward", forward_backward, 3.5 * forward_flops)):
        # FlexAttention has no backward on CPUs.
        runs = {name: (lambda a=a, run=run: run(a)) for name, a in attentions.items() if run is forward or name != FLEX}
        check_equal(runs)
        memory = {name: peak_memory(run) for name, run in runs.items()}
        timings = measure(runs, args.repeats)
        for name, timing in timings.items():
            rows.append(
                {
                    "what": what,
                    "candidate": name,
                    "ms": timing.median * 1e3,
                    "from..to": timing.spread,
                    "times ours": timing.median / timings[OURS].median,
                    "useful GFLOP/s": flops / timing.median / 1e9,
                    "memory MB": memory[name],
                }
            )
        if run is forward:
            rows += [{"what": what, "candidate": name, "from..to": f"failed: {why}"} for name, why in failures.items()]
        else:
            rows.append({"what": what, "candidate": FLEX, "from..to": "no backward on CPUs"})
    print_table(rows)
    write_json(args.json, layout=repr(layout), heads=args.heads, width=args.width, rows=rows)


def ours(layout: ThoughtLayout) -> Attention:
    return lambda q, k, v: thought_attention(q, k, v, layout, backend="cpu")


def dense(layout: ThoughtLayout) -> Attention:
    """The mask is additive, as SDPA wants it inside, and one for the whole batch: its best case."""
    seen = ThoughtLayout.every_position(1, layout.L, layout.N, layout.S).dense_mask()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)[:, None]
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(layout: ThoughtLayout) -> Attention:
    L, N, S, M = layout.L, layout.N, layout.S, layout.M

    def sees(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        t = torch.where(row < L, row, (row - L) // (N * S))
        same_thought = (row >= L) & (key >= L) & ((row - L) // S == (key - L) // S)
        return ((key < L) & (key <= t)) | (same_thought & (key <= row))

    block_mask = create_block_mask(sees, None, None, M, M, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def check_equal(runs: dict[str, Callable]) -> None:
    """Raises AssertionError where a candidate computes something else than the others."""
    results = {name: run() for name, run in runs.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results[OURS], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="L, text positions")
    parser.add_argument("--thoughts", type=int, default=2, help="N, thoughts per position")
    parser.add_argument("--rows", type=int, default=12, help="S, rows per thought")
    parser.add_argument("--heads", type=int, default=8, help="H")
    parser.add_argument("--width", type=int, default=64, help="K")
    parser.add_argument("--batch", type=int, default=2, help="B")
    add_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
