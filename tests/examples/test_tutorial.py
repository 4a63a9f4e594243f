"""The tutorial: every command is run, in order and in one folder, and prints what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
REAL = "\n## A real model\n"
DECIMAL = re.compile(r"[+-]?\d+\.\d+(?!\w)")
INTERVAL = re.compile(r"([+-]?\d+\.\d+) \(([+-]?\d+\.\d+) to ([+-]?\d+\.\d+)\)")
# What depends on the machine alone: the time of a run, its speed, which digits a model thinks and writes, and how many of a
# text's seven tokens that helps, since training amplifies the rounding of its instruction set.
MACHINE = re.compile(r"(?<= steps in ).*$|(?<=thoughts/s).*$|(?<=')\d+(?=')|\d+%(?= of the tokens helped)|\d+%(?= hurt by)")


def steps(text):
    """What a reader types: each command, and what it prints."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed


def close(one, other):
    """Decimals that may differ between machines: training with samples amplifies rounding."""
    return abs(float(one) - float(other)) <= 0.1 + 0.2 * abs(float(other))


def same_estimate(one, other):
    """A figure with its interval: close, or within the interval of the page's, which is wide for a single text."""
    return float(other[1]) <= float(one[0]) <= float(other[2]) or all(map(close, one, other))


def differs(printed, documented):
    """The first line that isn't as documented; "..." stands for any lines."""
    before, dots, after = documented.partition("\n...\n")
    lines = printed.splitlines()
    wanted = before.splitlines()
    if dots:
        tail = after.splitlines()
        lines = lines[: len(wanted)] + lines[len(lines) - len(tail) :]
        wanted += tail
    if len(lines) != len(wanted):
        return f"{len(lines)} lines instead of {len(wanted)}"
    for line, want in zip(lines, wanted, strict=True):
        line, want = MACHINE.sub("", line), MACHINE.sub("", want)
        same = DECIMAL.sub("N", line).split() == DECIMAL.sub("N", want).split()
        same = same and all(map(same_estimate, INTERVAL.findall(line), INTERVAL.findall(want)))
        if not same or not all(map(close, *(DECIMAL.findall(INTERVAL.sub("", x)) for x in (line, want)))):
            return f"{line!r} instead of {want!r}"
    return None


def test_a_difference_is_found():
    wanted = "loss 1.55\n...\nwrote a.json\n"
    assert differs("loss 1.60\nmore\nwrote a.json\n", wanted) is None
    assert "loss 2.60" in differs("loss 2.60\nmore\nwrote a.json\n", wanted)
    assert "wrote b.json" in differs("loss 1.55\nwrote b.json\n", wanted)
    assert differs("one\ntwo\n", "one\n") == "2 lines instead of 1"
    assert differs("gain -0.3 (-0.9 to +0.3), 5.0\n", "gain -0.5 (-1.5 to +0.5), 5.0\n") is None
    assert "gain -1.6" in differs("gain -1.6 (-2.0 to -1.2), 5.0\n", "gain -0.5 (-1.5 to +0.5), 5.0\n")
    assert differs("gain -0.3 (-0.9 to +0.3), 9.0\n", "gain -0.5 (-1.5 to +0.5), 5.0\n")
    share = "{}% of the tokens helped by what was thought, {}% hurt by thinking, {}% of all\n"
    assert differs(share.format(29, 14, 5), share.format(14, 0, 5)) is None
    assert differs(share.format(14, 0, 6), share.format(14, 0, 5))
    assert differs("100 steps in 3 s\n  thoughts/s 7 8\n", "100 steps in 1 min 2 s\n  thoughts/s  1000   2\n") is None


def run_all(text, home):
    """Run each command of the text there, and compare; the number of them."""
    path = f"{ROOT / 'python'}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    found = list(steps(text))
    for command, printed in found:
        words = re.sub("^(quietstar|pip) ", r"python -m \1 ", command)
        words = re.sub("^python ", f"{sys.executable} ", words)
        run = subprocess.run(words, shell=True, cwd=home, env=environment, capture_output=True, text=True, timeout=900)
        if command.startswith("pip ") and run.returncode:
            pytest.skip(f"{command}: {run.stderr[-200:]}")
        assert run.returncode == 0, f"{command}\n{run.stderr[-2000:]}"
        assert not (wrong := differs(run.stdout, printed)), f"{command}: {wrong}"
    return len(found)


@pytest.mark.long
def test_the_tutorial(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    home = tmp_path / "tutorial"
    home.mkdir()
    assert run_all(PAGE.read_text().partition(REAL)[0], home) >= 7
    assert (home / "page.html").exists() and (home / "runs/sums/metrics.png").exists()


@pytest.mark.long
def test_the_tutorial_with_a_real_model(tmp_path):
    assert run_all(PAGE.read_text().partition(REAL)[2], tmp_path) >= 6
