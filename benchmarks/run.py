"""Run the benchmarks: every op against what people use without it, checked for equal results and then timed in turn.

    make bench                                                    all ops, the default grid, in under five minutes
    python -m benchmarks.run --full                               the whole grid, up to the sizes where dense masks fail
    python -m benchmarks.run --op thought_attention               one op
    python -m benchmarks.run --grid headline text                 the headline cases and those that vary the text's length
    python -m benchmarks.run --list                               cases, baselines, and why a baseline can't run here
    python -m benchmarks.run --op sample_token --json rows.json   add the rows to a file, which may have others

It first measures the machine's peak rates, so that every row can say how far it is from its roofline: on a CPU with a copy and
with multiply-adds in registers, beside the matmuls of PyTorch and oneDNN; on a GPU with a copy and a matmul.
A run of all ops and grids writes benchmarks/results/<device>.md, .json and, with matplotlib, .png. A narrower run writes only
the file that --json names. Run it in the repository's root; where quietstar isn't installed, set PYTHONPATH=python.
"""

from __future__ import annotations

from benchmarks import (
    bench_branches,
    bench_group_rl,
    bench_host,
    bench_linear_logprob,
    bench_memory,
    bench_naive,
    bench_online,
    bench_sample_token,
    bench_step,
    bench_thought_attention,
    bench_thought_decode,
    bench_trees,
    command,
)

MODULES = (
    bench_thought_attention,
    bench_thought_decode,
    bench_sample_token,
    bench_linear_logprob,
    bench_branches,
    bench_trees,
    bench_step,
    bench_naive,
    bench_group_rl,
    bench_online,
    bench_memory,
    bench_host,
)
BENCHMARKS = {module.BENCHMARK.op: module.BENCHMARK for module in MODULES}  # in the order of the results pages

if __name__ == "__main__":
    command.main([*BENCHMARKS.values()], __doc__)
