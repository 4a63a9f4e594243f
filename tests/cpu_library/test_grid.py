"""The compiled library for CPUs without PyTorch: random cases by every instruction set, with sanitizers and two compilers."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import grid  # noqa: E402

pytestmark = [pytest.mark.build, pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on PATH")]
CASES = {"plain": 100, "address": 60, "thread": 20}


def runs_here(name):
    """Whether the processor has the instruction set: the library falls back to another one if not."""
    return grid.run(grid.build(), name, 1, 0).stdout.startswith(name + " ")


def results(program, name, threads, cases):
    done = grid.run(program, name, threads, cases)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", grid.SETS)
def test_results_do_not_depend_on_the_number_of_threads(name):
    if not runs_here(name):
        pytest.skip(f"this processor has no {name}")
    assert len({results(grid.build(), name, threads, CASES["plain"]) for threads in (1, 2, 5)}) == 1


def sizes(text):
    return [float(size) for size in text.split()[2:]]


def assert_same(results, fp32, bf16):
    for bound, (first, *rest) in zip((fp32, bf16), zip(*map(sizes, results), strict=True), strict=True):
        assert first > 1e4 and all(abs(size - first) < bound * first for size in rest), (first, rest)


def test_instruction_sets_agree():
    widened, paired = (), results(grid.build(kind="pairs"), "baseline", 2, 60)
    for name in filter(runs_here, grid.SETS):
        found = results(grid.build(), name, 2, 60)
        if name == "avx512_bf16":
            assert_same((paired, found), 1e-6, 1e-6)
        else:
            widened += (found,)
    assert_same(widened, 1e-6, 1e-6)
    assert_same((widened[0], paired), 1e-6, 1e-3)
    assert sizes(widened[0])[1] != sizes(paired)[1]


def test_on_arm():
    """With NEON, in an emulator."""
    for tool in (grid.ARM, grid.EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on PATH")
    program = grid.build(grid.ARM)
    one, three = (results(program, "baseline", threads, 60) for threads in (1, 3))
    assert one == three
    assert_same((one, results(grid.build(), "baseline", 1, 60)), 1e-6, 1e-6)


@pytest.mark.parametrize("name", grid.SETS)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(kind, name):
    if not runs_here(name):
        pytest.skip(f"this processor has no {name}")
    results(grid.build(kind=kind), name, 3, CASES[kind])


def test_two_compilers_give_the_same_bits():
    if shutil.which("clang++") is None:
        pytest.skip("there is no clang++ on PATH")
    for name in filter(runs_here, grid.SETS):
        assert results(grid.build("clang++"), name, 2, 100) == results(grid.build("g++"), name, 2, 100)


@pytest.mark.skipif("avx512_bf16" not in grid.SETS, reason="this processor's architecture has no AVX-512")
def test_an_older_compiler(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *bf16*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    assert [*grid.setup.known_sets("g++")] == [*grid.SETS]
    assert [*grid.setup.known_sets(str(compiler))] == [name for name in grid.SETS if name != "avx512_bf16"]
    assert not results(grid.build(str(compiler)), "avx512_bf16", 1, 3).startswith("avx512_bf16 ")


BUGS = {  # a build, what it says, and the change
    "a key after the last is read": (
        "address",
        "ERROR: AddressSanitizer: ",
        ("rows.hpp", "i < count; ++i)\n        zeros +=", "i <= count; ++i)\n        zeros +="),
    ),
    "the end of a thread orders nothing": (
        "thread",
        "data race",
        ("run.hpp", "std::memory_order_acq_rel", "std::memory_order_relaxed"),
    ),
    "a row is not written": (
        "plain",
        "is not written",
        ("forward.hpp", "r < tile.rows; ++r) finish_row", "r + 1 < tile.rows; ++r) finish_row"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found(name):
    kind, said, bug = BUGS[name]
    done = grid.run(grid.build(kind=kind, bug=bug), "baseline", 3, CASES[kind])
    assert done.returncode != 0 and said in done.stderr, done.stderr[-2000:]
