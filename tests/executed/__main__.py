"""``make executed``: what Triton's compiler makes of the kernels, executed on a CPU; needs no GPU. See docs/executed.md.

make executed                           the kernel suite, every module of every kernel, the wrapper, and the kernels in Gluon
make executed STAGE=modules DOCS=docs   one of the stages; DOCS replaces the page there
make executed STAGE=gluon ONLY=deep     of the kernels in Gluon, only the cases and mistakes that pytest -k chooses
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import adversary
import report

from benchmarks.report.committed import as_json

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUITE = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "thought_attention", "thought_attention_leaks", "thought_decode", "linear_logprob", "linear_logprob_ways",
        "sample_token", "decoder_layer", "triton_thought_attention", "triton_thought_decode", "triton_sample_token",
    )
]  # fmt: skip
# PyTorch's own checks, what checkpointing computes again and storage of gigabytes meet tensors that claim to be on a GPU, and
# ttsem large logits. Of a test of many long cases, those of packed branches run.
LEFT_OUT = (
    *("opcheck", "compile", "gradcheck", "what_is_kept", "exponential", "large_vocabulary", "far_from_each_other"),
    "(where_a_row and not packed)",
)
CASES = " and ".join(["triton", *(f"not {name}" for name in LEFT_OUT)])
SHARES = 8  # of the suite, side by side
TARGETS = (90, 80, 100)  # compute capabilities
UNDER_TTSEM = "import sys; from ttsem.sanitize import run_pytest; sys.exit(run_pytest(sys.argv[2:], int(sys.argv[1])))"


@dataclass
class Job:
    """A process that runs tests; what its plugin found is in ``result``, if it got there."""

    stage: str
    name: str
    arguments: list[str]
    cc: int = 90
    code: int = 0
    output: str = ""
    seconds: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)


def jobs(stages: list[str], only: str) -> Iterator[Job]:
    if "modules" in stages:
        for cc in TARGETS:
            for test in ("plain", *["options", "tree"] * (cc == 90), "test_decode", "sample_token", "linear_logprob", "layer"):
                yield Job("modules", f"{test}, sm_{cc}", ["tests/executed/each_kernel.py", "-k", test, f"--modules={cc}"], cc)
    if "wrapper" in stages:
        yield Job("wrapper", "wrapper", ["tests/executed/wrapper.py"])
    if "gluon" in stages:
        for schedule in adversary.SCHEDULES:
            yield Job("gluon", schedule, ["tests/executed/gluon.py", f"--schedule={schedule}", "-k", only])
        yield Job("gluon", "mistakes", ["tests/executed/mistakes.py", f"--schedule={adversary.SCHEDULES[0]}", "-k", only])
    if "suite" in stages:
        for share in range(SHARES):
            yield Job("suite", f"suite, share {share}", [*SUITE, "-k", CASES, f"--shard={share}/{SHARES}"])


def run(job: Job, out: Path) -> Job:
    found = out / f"{job.stage}-{job.name.replace(' ', '-')}.json"
    found.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "python", HERE)))
    start = [sys.executable, "-c", UNDER_TTSEM, str(job.cc), "-p", "plugin", f"--executed={found}"]
    began = time.monotonic()
    ran = subprocess.run(
        [*start, "-q", "-p", "no:cacheprovider", *job.arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    job.code, job.output, job.seconds = ran.returncode, ran.stdout + ran.stderr, time.monotonic() - began
    if found.exists():
        job.result = json.loads(found.read_text())
    print(f"{job.stage}: {job.name}, {job.seconds:.0f} s, exit code {job.code}", flush=True)
    if job.code:
        print(job.output, flush=True)
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=report.STAGES, default=[*report.STAGES])
    parser.add_argument("--only", default="", metavar="K", help="of the stage gluon, which takes a quarter of an hour")
    parser.add_argument("--out", type=Path, default=ROOT / "build/executed")
    parser.add_argument("--docs", type=Path, help="write executed.md and executed.json here, instead of into --out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        done = list(workers.map(lambda job: run(job, options.out), jobs(options.stage, options.only)))
    folder = options.docs or options.out
    known = folder / "executed.json"
    results = json.loads(known.read_text()) if known.exists() else {}
    results |= {"versions": report.versions(), "date": date.today().isoformat()}
    for stage in options.stage:
        results[stage] = report.STAGES[stage]([job for job in done if job.stage == stage])
    earlier = {stages: x for stages, x in results.get("seconds", {}).items() if not {*stages.split()} <= {*options.stage}}
    results["seconds"] = earlier | {" ".join(options.stage): round(time.monotonic() - began)}
    known.write_text(as_json(results))
    print(f"wrote {report.write(results, folder)}")
    sys.exit(any(job.code for job in done))


if __name__ == "__main__":
    main()
