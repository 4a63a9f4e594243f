"""Results of experiments: a file per seed in the run's folder, and all that stand on the page in one file beside it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.report.committed import as_json
from quietstar.files.reading import read_json
from quietstar.files.writing import write_whole

Result = dict[str, Any]
Results = dict[str, list[Result]]  # by name of the experiment, in order of the seeds

FILE = "experiments.json"
FRESH = "fresh"  # in the place of a size: the quick size on seeds that nothing was ever tried on
PACKAGES = ("quietstar-kernels", "torch", "transformers")


def result_file(out: Path, name: str, size: str, seed: int) -> Path:
    return out / size / name / f"seed-{seed}.json"


def described(result: Result, seed: int, seconds: float, resumed: bool) -> Result:
    """A result with what is needed to judge it: its seed, when and in what time of a core it was measured, and with what.

    The time of a run that was stopped and resumed is that of its last part.
    """
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    date = datetime.now(timezone.utc).date().isoformat()
    cost = {"seconds": seconds, "resumed": resumed}
    return {"seed": seed, "date": date, **cost, "versions": versions, "machine": platform.machine(), **result}


def read_results(out: Path, size: str, names: list[str], seeds: Iterable[int]) -> Results:
    """The results of these seeds in the folder of a run, of the experiments that have any."""
    files = {name: [result_file(out, name, size, seed) for seed in seeds] for name in names}
    found = {name: [read_json(file, dict[str, Any]) for file in several if file.exists()] for name, several in files.items()}
    return {name: results for name, results in found.items() if results}


def merged(file: Path, size: str, found: Results) -> dict[str, Results]:
    """All results by size, those in ``file`` and these, which replace all seeds of an experiment; ``file`` then holds them."""
    stored: dict[str, Results] = read_json(file, dict[str, Any]) if file.exists() else {}
    stored[size] = dict(sorted((stored.get(size, {}) | found).items()))
    write_whole(file, as_json(stored))
    return stored
