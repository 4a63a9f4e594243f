"""Two threads and no network, here and in the processes that tests start; set before torch is imported."""

import importlib
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
# Small operations on a busy machine: a thread that waits lets go of its core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)
if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then; read when quietstar_kernels.triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def scripts(monkeypatch):
    """Import a script of experiments/ by name, as the scripts import each other."""
    folder = Path(__file__).parents[1] / "experiments"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def pytest_addoption(parser):
    parser.addoption("--longest", type=float, metavar="SECONDS", help="a test that takes longer fails")
    parser.addoption("--times", metavar="FILE", help="write the seconds of each test above 0.5 to this file")


def pytest_configure(config):
    config.began = time.monotonic()


def pytest_collection_finish(session):
    """What a process imports once, such as PyTorch's compiler, is no test's time."""
    if session.config.getoption("longest"):
        for name in ("transformers.models.llama.modeling_llama", "transformers.trainer"):
            importlib.import_module(name)
        torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1, requires_grad=True))
        torch.use_deterministic_algorithms(False)


def cpu_seconds():
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def slowness():
    """How many times as long as on the machine that ``--longest`` is meant for a loop takes now, at least 1."""
    began = time.process_time()
    sum(i * i for i in range(10**6))
    return max(1.0, (time.process_time() - began) / 0.05)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    item.config.cpu_seconds = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a test that takes more than ``--longest`` by both clocks, also when a slow or busy machine is allowed for."""
    report = yield
    before, item.config.cpu_seconds = item.config.cpu_seconds, cpu_seconds()
    used, longest = item.config.cpu_seconds - before, item.config.getoption("longest")
    took = min(call.duration, used)
    if longest and report.passed and call.when == "call" and took > longest and took > longest * slowness():
        report.outcome = "failed"
        report.longrepr = (
            f"the test took {call.duration:.1f} s, {used:.1f} s of a CPU, where {longest:g} are the most: "
            "make it smaller, or mark it kernels, build or long"
        )
    return report


def pytest_terminal_summary(terminalreporter, config):
    reports = [x for several in terminalreporter.stats.values() for x in several if isinstance(x, pytest.TestReport)]
    print_records(terminalreporter, reports)
    if file := config.getoption("times"):
        write_times(Path(file), reports, (time.monotonic() - config.began) / 60)


def print_records(terminalreporter, reports):
    """What tests recorded, also in other processes.

    ``record_property("table", text)`` is printed; of ``record_property("counts", [title, {name: count}])`` the sums are.
    """
    sums: dict[str, dict[str, int]] = {}
    for name, value in (pair for report in reports if report.when == "call" for pair in report.user_properties):
        if name == "table":
            terminalreporter.write_line(value)
        elif name == "counts":
            title, counts = value
            total = sums.setdefault(title, dict.fromkeys(counts, 0))
            for what, count in counts.items():
                total[what] += count
    for title, counts in sums.items():
        terminalreporter.write_line(f"{title}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


def write_times(file, reports, minutes):
    seconds: dict[str, float] = {}
    for report in reports:
        seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    rows = sorted((-total, test) for test, total in seconds.items() if total > 0.5)
    lines = [f"# make test TIMES={file}: {minutes:.1f} minutes", *(f"{-total:.1f} {test}" for total, test in rows)]
    file.write_text("\n".join(lines) + "\n")
