"""Runs the experiments of the recipes and writes their part of docs/recipe-results.md, with tables and plots.

    python experiments/run_experiments.py                what the claims need, one seed, about 45 minutes on two cores
    python experiments/run_experiments.py star --seeds 3 three seeds of one of them
    python experiments/run_experiments.py doses          how the gain depends on each setting, which the first line leaves out
    python experiments/run_experiments.py --fresh        the claims on five seeds that nothing was tried on, 100 to 104
    python experiments/run_experiments.py --full         ablations and longer runs, one seed, two hours

Every seed of every experiment is a process with one thread. Results are kept in runs/experiments, so a stopped run continues
where it stopped. With --docs they also replace those in docs/experiments.json, of which the page is written; --seeds 0 runs
nothing and only writes the page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from experiments_results import FILE, FRESH, described, merged, read_results, result_file  # noqa: E402, from this folder

SIZES = ("tiny", "quick", "full")
FIRST_FRESH = 100
CURVES = ("doses", "objectives", "rare")  # of Quiet-STaR itself, with many runs each
NO_MORE = ("chains", "objectives", "online")  # have no size full


def names() -> list[str]:
    """The names of all experiments: the files here with a title."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\nTITLE = " in path.read_text(encoding="utf-8"))


def run_one(name: str, seed: int, size: str, out: Path) -> None:
    """Run one seed of one experiment in this process, unless it is done.

    A run that was killed may have left this process's double behind, which is waited for.
    """
    import torch
    from transformers.utils import logging

    from quietstar.files.writing import FileLock, write_whole

    file = result_file(out, name, size, seed)
    folder = file.with_suffix("")
    resumed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    while not (lock := FileLock.acquire(file.with_suffix(".lock"))):
        time.sleep(1)
    if not file.exists():
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        began = time.process_time()
        result = importlib.import_module(name).run(seed, size, folder)
        write_whole(file, json.dumps(described(result, seed, time.process_time() - began, resumed), indent=1) + "\n")
    lock.release(remove=True)


def start(name: str, seed: int, size: str, out: Path) -> int:
    """The same in a new process; returns its exit code."""
    command = [sys.executable, __file__, name, "--seed", str(seed), "--size", size, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
    log = result_file(out, name, size, seed).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    end = "done" if code == 0 else f"failed, see {log}"
    print(f"{name}, seed {seed}: {end}, {time.perf_counter() - began:.0f} s", flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(names())}; default all but {', '.join(CURVES)}")
    parser.add_argument("--full", action="store_true", help=f"ablations and longer runs, of all but {', '.join(NO_MORE)}")
    parser.add_argument(
        "--fresh", action="store_true", help=f"five fresh seeds from {FIRST_FRESH}; they stand beside the others"
    )
    parser.add_argument("--size", choices=SIZES, help="tiny only shows that everything runs; default quick")
    parser.add_argument("--seeds", type=int, help="how many seeds, from 0; default 1, or 5 with --fresh")
    parser.add_argument("--seed", type=int, help="only this seed, in this process")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes at once; default 2")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="folder for results")
    parser.add_argument("--docs", type=Path, help=f"also keep results in {FILE} here, and write recipe-results.md")
    options = parser.parse_args()
    size = options.size or ("full" if options.full else "quick")
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        parser.error(f"there is no experiment {', '.join(unknown)}; there are {', '.join(names())}")
    left_out = NO_MORE if size == "full" else CURVES
    chosen = options.names or [name for name in names() if name not in left_out]
    if size == "full" and (same := set(chosen) & set(NO_MORE)):
        parser.error(f"there are no ablations of {', '.join(sorted(same))}")
    if options.seed is not None:
        for name in chosen:
            run_one(name, options.seed, size, options.out)
        return 0
    if options.fresh and size != "quick":
        parser.error("--fresh is for the claims, which are of size quick")
    first, count = (FIRST_FRESH, 5) if options.fresh else (0, 1)
    seeds = range(first, first + (count if options.seeds is None else options.seeds))
    jobs = [(name, seed) for seed in seeds for name in chosen if not result_file(options.out, name, size, seed).exists()]
    print(f"{len(jobs)} to run, {len(seeds) * len(chosen) - len(jobs)} done before", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda job: start(*job, size, options.out), jobs))

    import experiments_report

    found = read_results(options.out, size, chosen, seeds)
    folder = options.docs or options.out / size
    folder.mkdir(parents=True, exist_ok=True)
    results = merged(folder / FILE, FRESH if options.fresh else size, found)
    if not any(results.values()):
        return 1
    print(f"wrote {experiments_report.write(results, folder)}")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
