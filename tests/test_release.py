"""A release: one version everywhere, workflows whose jobs are targets of the Makefile, and what runs when in CI."""

import re
from pathlib import Path

import quietstar_kernels

ROOT = Path(__file__).parents[1]


def test_one_version():
    version = quietstar_kernels.__version__
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_workflows_run_targets_of_the_makefile():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        for command in re.findall(r"run: (.*)", file.read_text()):
            program, what, *_ = command.split()
            assert program == "gh" or command == "bash .ci/run" or (program == "make" and what in targets), command


def test_workflows_pin_the_actions_of_others():
    """By commit: a name such as v5 can be moved to other code, and one of the jobs may publish."""
    used = [x for file in (ROOT / ".github/workflows").glob("*.yml") for x in re.findall(r"uses: (.*)", file.read_text())]
    assert used and [x for x in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", x)] == []


def test_every_long_test_runs_in_ci_when_something_is_touched():
    """Each of its paths begins a file's, and each file with marked tests is in a part of that suite."""
    table = re.search(r"<<'END'\n(.*?)\nEND\n", (ROOT / ".ci/run").read_text(), re.DOTALL)[1]
    parts = [line.split() for line in table.splitlines()]
    assert [path for _, _, *paths in parts for path in paths if not any(ROOT.glob(f"{path.removesuffix('/')}*"))] == []
    tested = {(suite, file) for suite, tests, *_ in parts for path in ROOT.glob(tests) for file in [path, *path.rglob("*.py")]}
    for file in (ROOT / "tests").rglob("*.py"):
        if re.match(r"(test_.*|conftest)\.py", file.name):
            for mark in {"kernels", "build", "long"} & {*re.findall(r"pytest\.mark\.(\w+)", file.read_text())}:
                assert (f"test-{mark}", file) in tested
