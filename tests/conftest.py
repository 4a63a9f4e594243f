"""Two threads and no network, here and in the processes that tests start; set before torch is imported."""

import importlib
import os
import shutil
import sys
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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws without a generator, and how it adds up, is the same in every run, whichever tests came before it."""
    torch.manual_seed(0)
    torch.set_num_threads(2)  # an experiment that ran in this process left one


@pytest.fixture
def scripts(monkeypatch):
    """Import a script of experiments/ by name, as the scripts import each other."""
    folder = Path(__file__).parents[1] / "experiments"
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None and os.environ.get("CI"):
        pytest.fail("no chromium here, and these tests must run in CI: apt-get install chromium")
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def pytest_terminal_summary(terminalreporter):
    """What tests recorded, also in other processes.

    ``record_property("table", text)`` is printed; of ``record_property("counts", [title, {name: count}])`` the sums are.
    """
    reports = [x for several in terminalreporter.stats.values() for x in several if isinstance(x, pytest.TestReport)]
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
