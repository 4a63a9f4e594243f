"""A release: one version everywhere, workflows whose jobs are targets of the Makefile, and what runs when in CI."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

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


def test_pre_commit_has_the_versions_of_make_lint():
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert hooks and [x for hook in hooks for x in hook["additional_dependencies"] if x not in pins] == []


@pytest.fixture
def history(tmp_path):
    """``commit(days, path, merge=None)`` in a repository with .ci/run; ``listed(folder=...)`` is what it would run."""

    def git(*arguments, days=0):
        date = f"{1_700_000_000 - 24 * 3600 * days} +0000"
        person = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = os.environ | person | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        subprocess.run(["git", "-C", tmp_path / "house", *arguments], check=True, env=environment, capture_output=True)

    def commit(days, path):
        file = tmp_path / "house" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{days}")
        git("add", path)
        git("commit", "-m", path, days=days)

    def listed(folder="house", **environment):
        command = ["bash", tmp_path / folder / ".ci/run", "--list"]
        said = subprocess.run(command, check=True, env=os.environ | environment, capture_output=True, text=True).stdout
        return said, set(re.findall(r"^  make (\S+)", said, re.MULTILINE))

    (tmp_path / "house/.ci").mkdir(parents=True)
    (tmp_path / "house/.ci/run").write_text((ROOT / ".ci/run").read_text())
    git("init", "-b", "main")
    git("add", ".")
    git("commit", "-m", "root", days=30)
    return git, commit, listed


@pytest.mark.long
def test_ci_chooses_by_the_commits_of_seven_days(history, tmp_path):
    git, commit, listed = history
    commit(20, "csrc/old.cpp")
    commit(8, "quietstar_kernels/triton/old.py")
    commit(6, "benchmarks/new.py")
    for number in range(60):  # more than a fixed number of commits would see
        commit(0, f"docs/{number}.md")
    said, suites = listed()
    assert suites == {"test-long"} and "the 61 commits since" in said and "benchmarks (1)" in said and "docs (60)" in said
    assert "test-kernels" in listed(SINCE="HEAD~62")[1] and "release-check" not in listed(SINCE="HEAD~62")[1]
    assert listed(SINCE="HEAD~1") == listed() == listed(SINCE="0" * 40)

    git("checkout", "-b", "branch", "HEAD~62")
    commit(15, "csrc/merged.cpp")  # old, but new on main
    git("mv", "csrc/old.cpp", "moved.md")
    git("commit", "-m", "moved", days=14)
    git("checkout", "main")
    git("merge", "branch")
    said, suites = listed()
    assert {"test-kernels", "wheel"} < suites and "csrc (2)" in said

    house = f"file://{tmp_path / 'house'}"
    for depth, all_new in ((5, True), (70, False)):
        subprocess.run(["git", "clone", "-q", "--depth", str(depth), house, tmp_path / str(depth)], check=True)
        assert ("shorter than seven days" in listed(str(depth))[0]) is all_new
    assert listed("70") == (said, suites) and suites < listed("5")[1]


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
