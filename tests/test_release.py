"""A release: one version everywhere, and workflows whose jobs are targets of the Makefile."""

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
