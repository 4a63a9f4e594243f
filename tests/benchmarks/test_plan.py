"""The plan of ``make gpu``: eleven minutes, in the order of their worth, of files, cases and baselines that exist."""

import itertools
import os
import re
import subprocess

import pytest
import torch

from benchmarks import command
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.stages import MINUTES, ROWS, STAGES, TREES, WITHOUT_A_GPU, Plan
from benchmarks.harness.candidate import Candidate
from benchmarks.run import BENCHMARKS

ALL = [*BENCHMARKS.values()]
LIST = re.compile(r"^ *(\d+) s to +(\d+) s  (\w+): ")


def selected(rows, device="cuda"):
    args = command.make_parser(ALL, None).parse_args([*rows.options, "--device", device])
    return [(case, command.baselines(args, benchmark, case)) for benchmark, case in command.select(ALL, args)]


def commands(plan, seconds=30.0):
    return {stage.name: [step.commands(seconds) for step in stage.steps] for stage in plan.stages()}


def test_it_takes_eleven_minutes_and_trees_come_first(tmp_path):
    stages = Plan(tmp_path / "a.json").stages()
    assert sum(stage.seconds for stage in stages) == pytest.approx(60 * MINUTES) == 660
    assert [stage.name for stage in stages] == [*STAGES]
    first = next(iter(commands(Plan(tmp_path / "a.json"))["check"][0].values()))
    assert TREES in first and not any(word.endswith(".py") and word != TREES for word in first)
    half = Plan(tmp_path / "a.json", MINUTES / 2).stages(["peers", "check"])
    assert [(stage.name, stage.seconds) for stage in half] == [("check", pytest.approx(30)), ("peers", pytest.approx(45))]


def test_the_list_of_what_runs_adds_up(capsys):
    gpu.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    slots = [tuple(map(int, match.groups()[:2])) for match in map(LIST.match, lines) if match]
    assert len(slots) == len(STAGES) and slots[0][0] == 0 and slots[-1][1] == 660 and lines[-1] == " 660 s together".strip()
    assert all(a[1] == b[0] for a, b in itertools.pairwise(slots))
    assert any("branches forward+backward, L 2048 C 8 S 256" in line and "SDPA, repeated prompts" in line for line in lines)
    with pytest.raises(SystemExit):
        gpu.main(["--list", "--minutes", "0"])


@pytest.mark.parametrize("name", ROWS)
def test_every_grid_and_baseline_exists(name):
    """``select`` ends the program where one doesn't."""
    found = selected(ROWS[name])
    assert {case.op for case, _ in found} == {*ROWS[name].ops}
    assert all(any(case.grid == grid for case, _ in found) for grid in ROWS[name].grids)
    smoke = command.make_parser(ALL, None).parse_args([*ROWS[name].options, "--device", "cpu", "--smoke"])
    assert {case.op for _, case in command.select(ALL, smoke)} == {*ROWS[name].ops}


def test_repeated_prompts_are_timed_in_every_row_of_branches():
    copies = {case.grid for case, against in selected(ROWS["peers"]) if "SDPA, repeated prompts" in {x.name for x in against}}
    every = {case.grid for case in BENCHMARKS["branches"].cases(torch.device("cuda"), False)}
    assert copies >= every


def test_all_tests_for_a_gpu_are_in_it(tmp_path):
    found = commands(Plan(tmp_path / "a.json"))
    shares = min(16, os.cpu_count())
    files = []
    for stage in ("check", "tests"):
        of_tests = [words for name, words in found[stage][0].items() if name.endswith(f" of {shares}")]
        assert len(of_tests) == shares
        files += [word for word in of_tests[0] if word.endswith(".py")]
    assert len(files) == len({*files}) and all((ROOT / file).exists() for file in files)
    left = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests/kernels").glob("test_*.py")
        if str(path.relative_to(ROOT)) not in files
    }
    assert left == {*WITHOUT_A_GPU}


def test_benchmarks_know_how_long_they_have(tmp_path):
    (step,) = (stage.steps for stage in Plan(tmp_path / "a.json").stages(["peers"]))
    (words,) = step[0].commands(90).values()
    args = command.make_parser(ALL, None).parse_args([word for word in words[3:] if word not in ("--device", "cuda")])
    assert args.minutes == 1.5 and args.json == tmp_path / "a.json"


def test_ops_take_turns_in_the_order_they_are_named_in():
    args = command.make_parser(ALL, None).parse_args(["--op", "host", "thought_decode", "--device", "cpu"])
    assert [case.op for _, case in command.select(ALL, args)][:4] == ["host", "thought_decode"] * 2


def test_only_some_baselines_are_run_and_unknown_ones_are_named(capsys):
    parser = command.make_parser(ALL, None)
    args = parser.parse_args(["--op", "sample_token", "--device", "cpu", "--against", "matmul"])
    (case, *_), benchmark = BENCHMARKS["sample_token"].smoke(torch.device("cpu")), BENCHMARKS["sample_token"]
    assert all(candidate.name.startswith("matmul") for candidate in command.baselines(args, benchmark, case))
    args.against = []
    assert command.baselines(args, benchmark, case) == []
    args.against = ["nobody"]
    with pytest.raises(SystemExit, match="--against: no nobody here; choose from matmul, softmax, multinomial"):
        command.select(ALL, args)


@pytest.mark.parametrize(
    "op, sizes, found",
    [
        ("thought_attention", "B=2,L=24", [{"B": 2, "L": 24, "N": 2, "S": 14, "H": 8, "G": 2, "K": 128}] * 2),
        ("branches", "C=3,S=5", [{"L": 512, "C": 3, "S": 5, "H": 8, "G": 2, "K": 64}] * 2),
    ],
)
def test_own_sizes(op, sizes, found):
    args = command.make_parser(ALL, None).parse_args(["--op", op, "--device", "cpu", "--sizes", sizes])
    cases = [case for _, case in command.select(ALL, args)]
    assert [case.sizes for case in cases] == found and {case.grid for case in cases} == {command.OWN}
    assert {case.what for case in cases} == {"forward", "forward+backward"}
    case = cases[0]
    assert case.inputs(seed=0)["q"].shape[2] == case.rows


@pytest.mark.parametrize("sizes, message", [("Q=3", "branches has no Q; it has L, C, S, H, G, K"), ("L=0", None), ("L", None)])
def test_sizes_that_are_refused(sizes, message, capsys):
    with pytest.raises(SystemExit, match=message or "2"):
        command.select(
            ALL, command.make_parser(ALL, None).parse_args(["--op", "branches", "--device", "cpu", "--sizes", sizes])
        )
    assert message or "must be letters and positive integers such as B=4,L=512" in capsys.readouterr().err


def test_the_list_of_wheels_is_found_by_make():
    """`make gpu-wheels` cuts it out of a page with this command."""
    (cut,) = re.findall(r"sed -n '([^']+)' (\S+) \| grep '=='", (ROOT / "Makefile").read_text())
    found = subprocess.run(["sed", "-n", *cut], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wheels = [line for line in found if "==" in line]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in wheels) and len(wheels) == len({*wheels})
    assert {"flash-attn-4", "liger-kernel", "trl"} <= {line.partition("==")[0] for line in wheels}


def test_a_candidate_names_its_version():
    assert re.fullmatch(r"quietstar-kernels \d\S+", Candidate("ours", lambda case: None, "quietstar-kernels").version)
    assert Candidate("theirs", lambda case: None, "no-such-package").version == "no-such-package"
