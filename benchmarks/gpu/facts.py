"""Print what a device's other figures are measured with: its copy in each way, its matmul, clocks under load, cache, memory.

python -m benchmarks.gpu.facts
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.harness.memory import cache_size
from benchmarks.report import results_file, tables, units

CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--json", type=Path, help="write the rates to this results file")
    parser.add_argument("--ceiling-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    command = "python -m benchmarks.gpu.facts"
    results = results_file.begin(args.json, args.device, [torch.bfloat16], command, args.ceiling_size)
    if args.json:
        results_file.save(results, args.json)
    found = [tables.peak_line(results["ceilings"]), f"Last-level cache {units.memory(cache_size(args.device))}."]
    if args.device.type == "cuda":
        of = torch.cuda.get_device_properties(args.device)
        found += [f"{of.multi_processor_count} multiprocessors, {units.memory(of.total_memory)}."]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        found += [f"{CLOCKS} just after: {subprocess.run(query, capture_output=True, text=True).stdout.strip()}."]
    print(" ".join(found))


if __name__ == "__main__":
    main()
