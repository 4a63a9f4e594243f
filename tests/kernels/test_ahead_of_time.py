"""Every Triton kernel compiles for GPUs that this machine doesn't have, without spills, and its shared memory fits.

For sm_90 the loops are checked too: products don't wait for each other, and copies start before they are needed and are read
after a barrier.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
LOWEST = HERE.parents[1] / ".venv-lowest/bin/python"
FEW = 2  # words that the sampler spills on sm_120, for which no tiles were chosen
OPS = sorted(path.stem for path in (HERE / "compiled").glob("*.py"))
# KB of shared memory a block may have
TARGETS = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
EXTENT = {"sm_80": "usual", "sm_100": "usual", "gfx942": "usual", "sm_120": "brief"}  # which has the tiles of sm_80


@functools.cache
def rules(op):
    """The module with an op's cases; loading it compiles nothing."""
    spec = importlib.util.spec_from_file_location(f"compiled_{op}", HERE / "compiled" / f"{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.build
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile(op, record_property):
    judge([op], "sm_90", "thorough", record_property)


@pytest.mark.build
@pytest.mark.parametrize("op", ["thought_attention", "thought_decode"])
def test_kernels_compile_for_trees(op, record_property):
    judge([op], "sm_90", "trees", record_property)


@pytest.mark.build
@pytest.mark.parametrize("target", EXTENT)
def test_kernels_compile_for_other_gpus(target, record_property):
    judge(OPS, target, EXTENT[target], record_property, spills=FEW if target == "sm_120" else 0)


@pytest.mark.build
def test_kernels_compile_with_the_oldest_triton(record_property):
    """GPU machines often have it."""
    if not LOWEST.exists():
        pytest.skip("make test-lowest makes the environment with the oldest versions")
    judge(OPS, "sm_90", "brief", record_property, str(LOWEST))


@pytest.mark.build
def test_other_tiles_compile():
    """What ``python -m benchmarks.gpu.tiles`` compiles before it times it."""
    tiles = (
        "from ahead_of_time import compiled_for\nfrom benchmarks.gpu import tiles\n"
        "for name in tiles.KERNELS:\n"
        "    with compiled_for('sm_90') as kernels:\n"
        "        tiles.compile_tile(name, 64, 0)\n"
        "    print(name, len(kernels))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(map(str, [HERE, HERE.parents[1]]))}
    run = subprocess.run([sys.executable, "-c", tiles], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 7 and not re.search(r" 0$", run.stdout, re.MULTILINE)


@pytest.mark.build
@pytest.mark.parametrize("python", [Path(sys.executable), LOWEST], ids=["this", "the oldest"])
def test_kernels_in_gluon(python, record_property):
    if not python.exists():
        pytest.skip("make test-lowest makes the environment with the oldest versions")
    rows = compiled(["thought_attention"], "sm_90", "gluon", record_property, str(python))
    of = rules("thought_attention")
    counts = {"gluon_attention_forward": 13, "gluon_attention_text_keys": 9, "attention_backward_own_keys": 9}
    assert Counter(row["kernel"] for row in rows) == counts
    for row in rows:
        if row["kernel"] in of.GLUON:
            judge_gluon(row, of)
        else:
            assert not row["spills"] and row["matrix"], f"{row['kernel']} {row['label']}"


def judge_gluon(row, of):
    """Loops over whole blocks have the most products. Edges have two kinds of them one after the other, of which one runs."""
    what = f"{row['kernel']} {row['label']}"
    assert not row["spills"] and not row["advice"], what
    assert row["shared"] <= TARGETS["sm_90"] * 1024 and row["registers"] * row["warps"] * 32 <= 65536, what
    assert len(row["loops"]) == of.GLUON[row["kernel"]], what
    most = max(loop["products"] for loop in row["loops"])
    for loop in row["loops"]:
        whole = loop["products"] == most
        assert loop["serialised"] <= (0 if whole else 1), f"{what}: products wait for the one before"
        assert loop["barriers"] == 0, f"{what}: one warp group waits for the others"
        assert not whole or loop["group_barriers"] <= of.GROUP_BARRIERS[row["kernel"]], what
    missing, without = row["fences"]
    assert not missing, f"{what}: no fence before {missing}"
    assert without and all(without), f"{what}: a fence that may be left out"


def judge(ops, target, extent, record_property, python=sys.executable, spills=0):
    rows = compiled(ops, target, extent, record_property, python)
    assert {row["op"] for row in rows} == {*ops}
    compiles = Counter((row["op"], row["label"], row["kernel"]) for row in rows)
    more = {
        f"{kernel} {label}": n
        for (op, label, kernel), n in compiles.items()
        if label in rules(op).COMPILES and n > rules(op).COMPILES[label].get(kernel, 1)
    }
    assert not more, f"compiled again for another size: {more}"
    for row in rows:
        judge_kernel(row, rules(row["op"]), target, spills)


def compiled(ops, target, extent, record_property, python):
    """The rows of ``compile_op.py``, which also become a table."""
    run = subprocess.run(
        [python, HERE / "compile_op.py", target, extent, *ops],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    lines = [f"{', '.join(ops)} on {target}"]
    for row in rows:
        lines.append(
            f"  {row['kernel']:<28} {row['label']:<40} {row['registers']:>3} registers, {row['spills']} spills, "
            f"{row['shared'] / 1024:>5.1f} KB, {row['warps']} warps, {row['matrix']} matrix instructions"
        )
        if extent == "gluon" and "loops" in row:
            lines[-1] += f", loops of {', '.join(str(loop['instructions']) for loop in row['loops'])}"
    record_property("table", "\n".join(lines))  # tests/conftest.py prints it at the end
    return rows


def judge_kernel(row, rules, target, spills):
    what = f"{row['kernel']} {row['label']}"
    allowed = getattr(rules, "SPILLS", {}).get(target, {})
    assert row["spills"] <= allowed.get(what, allowed.get(row["kernel"], spills)), what
    assert row["shared"] <= TARGETS[target] * 1024, what
    # On a GPU, two warp groups that share the columns of tf32 products gave wrong results (Triton 3.6).
    assert not (row["warp_groups"] and "float32" in row["label"]), what
    if row["kernel"] not in rules.NO_MATRIX and "float32" not in row["label"]:
        assert row["matrix"], what
    if "loops" in row:
        main = row["loops"][: rules.HGMMA[row["kernel"]]]
        assert len(main) == rules.HGMMA[row["kernel"]], what
        if what not in getattr(rules, "SERIAL", ()):
            assert not any(loop["serialised"] for loop in row["loops"]), f"{what}: products wait for the one before"
            assert not row["advice"], f"{what}: ptxas says {row['advice']}"
        if what not in getattr(rules, "WAITS", ()):
            assert all(loop["in_flight"] for loop in main), f"{what}: a loop waits for a copy that it has just started"
        assert all(loop["ordered"] for loop in row["loops"]), f"{what}: no barrier between copies and what reads them"
