"""The plan of ``make gpu``: eleven minutes, in the order of their worth, of files, cases and baselines that exist."""

import itertools
import os
import re
import shutil
import subprocess

import pytest
import torch

from benchmarks import run
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import tiles
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.stages import MINUTES, ROWS, STAGES, TREES, WITHOUT_A_GPU, Plan
from benchmarks.run import BENCHMARKS

LIST = re.compile(r"^ *(\d+) s to +(\d+) s  (\w+): ")


def selected(rows, device="cuda"):
    args = run.make_parser().parse_args([*rows.options, "--device", device])
    return [(case, run.baselines(args, benchmark, case)) for benchmark, case in run.select(args)]


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
    smoke = run.make_parser().parse_args([*ROWS[name].options, "--device", "cpu", "--smoke"])
    assert {case.op for _, case in run.select(smoke)} == {*ROWS[name].ops}


def test_gluon_is_checked_then_measured_beside_triton_then_its_tiles_are_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    found = commands(Plan(tmp_path / "a.json"))
    check = found["sanitize"][0]["Gluon"]
    assert check[:2] == ["env", "QUIETSTAR_GLUON=1"] and check[-4:] == ["--backend", "triton", "--op", "thought_attention"]
    for name in ("NaN, Gluon", "memcheck, Gluon", "synccheck, Gluon"):
        assert found["sanitize"][0][name][-4:] == ["benchmarks.gpu.small_cases", "--device", "cuda", "--gluon"]
    rows = selected(ROWS["attention"])
    assert all([x.name for x in against] == ["thought_attention, Gluon"] for _, against in rows)
    assert {(case.op, case.L, case.B) for case, _ in rows} >= {("thought_attention", L, B) for L, B in ((256, 8), (2048, 16))}
    assert found["attention"][2]["tiles, Gluon"][-5:-1] == ["forward in Gluon", "text keys in Gluon", "own keys", "--seconds"]


@pytest.mark.parametrize("width, stages", [(64, {2, 3, 4}), (128, {2})])
def test_tiles_in_gluon_fit_into_shared_memory(width, stages):
    """Of blocks of 128 keys with edges of 32, the default among them."""
    fitting = [x.blocks for x in tiles.KERNELS["forward in Gluon"][2] if tiles.fits(x, width)]
    assert {x["STAGES"] for x in fitting if (x["BLOCK_N"], x["BLOCK_EDGE"]) == (128, 32)} == stages
    assert tiles.configs.ATTENTION_FORWARD_GLUON["sm_90", 2, width].blocks in fitting
    assert all(tiles.fits(x, width) for x in tiles.KERNELS["forward"][2])


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
    args = run.make_parser().parse_args([word for word in words[3:] if word not in ("--device", "cuda")])
    assert args.minutes == 1.5 and args.json == tmp_path / "a.json"


def test_ops_take_turns_in_the_order_they_are_named_in():
    args = run.make_parser().parse_args(["--op", "host", "thought_decode", "--device", "cpu"])
    assert [case.op for _, case in run.select(args)][:4] == ["host", "thought_decode"] * 2


def test_only_some_baselines_are_run_and_unknown_ones_are_named(capsys):
    parser = run.make_parser()
    args = parser.parse_args(["--op", "sample_token", "--device", "cpu", "--against", "matmul"])
    (case, *_), benchmark = BENCHMARKS["sample_token"].smoke(torch.device("cpu")), BENCHMARKS["sample_token"]
    assert all(candidate.name.startswith("matmul") for candidate in run.baselines(args, benchmark, case))
    args.against = []
    assert run.baselines(args, benchmark, case) == []
    args.against = ["nobody"]
    with pytest.raises(SystemExit, match="--against: no nobody here; choose from matmul, softmax, multinomial"):
        run.select(args)


@pytest.mark.parametrize(
    "op, sizes, found",
    [
        ("thought_attention", "B=2,L=24", [{"B": 2, "L": 24, "N": 2, "S": 14, "H": 8, "G": 2, "K": 128}] * 2),
        ("branches", "C=3,S=5", [{"L": 512, "C": 3, "S": 5, "H": 8, "G": 2, "K": 64}] * 2),
    ],
)
def test_own_sizes(op, sizes, found):
    args = run.make_parser().parse_args(["--op", op, "--device", "cpu", "--sizes", sizes])
    cases = [case for _, case in run.select(args)]
    assert [case.sizes for case in cases] == found and {case.grid for case in cases} == {run.OWN}
    assert {case.what for case in cases} == {"forward", "forward+backward"}
    case = cases[0]
    assert case.inputs(seed=0)["q"].shape[2] == case.rows


@pytest.mark.parametrize("sizes, message", [("Q=3", "branches has no Q; it has L, C, S, H, G, K"), ("L=0", None), ("L", None)])
def test_sizes_that_are_refused(sizes, message, capsys):
    with pytest.raises(SystemExit, match=message or "2"):
        run.select(run.make_parser().parse_args(["--op", "branches", "--device", "cpu", "--sizes", sizes]))
    assert message or "must be letters and positive integers such as B=4,L=512" in capsys.readouterr().err


def test_the_list_of_wheels_is_found_by_make():
    """`make gpu-wheels` cuts it out of a page with this command."""
    (cut,) = re.findall(r"sed -n '([^']+)' (\S+) \| grep '=='", (ROOT / "Makefile").read_text())
    found = subprocess.run(["sed", "-n", *cut], cwd=ROOT, capture_output=True, text=True).stdout.split()
    wheels = [line for line in found if "==" in line]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in wheels) and len(wheels) == len({*wheels})
    assert {"flash-attn-4", "liger-kernel", "trl"} <= {line.partition("==")[0] for line in wheels}
