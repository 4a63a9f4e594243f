"""Mistakes put into the kernels in Gluon, each of which must be found under the schedules that are named with it."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import adversary
import gluon
import pytest

from quietstar_kernels.triton import thought_attention
from quietstar_kernels.triton.thought_attention import gluon_backward_keys, gluon_forward

LONG = ("long", "plain", (2, 1), (64, gluon.BF16), "all")
PACKED = ("packed", "plain", (2, 1), (64, gluon.BF16), "all")
NAN = ("branch", *PACKED), gluon.check_nan
NAN_IN_ONE_GROUP = ("branch", "a group without rows", *PACKED[1:]), gluon.check_nan  # keys reach both, if both have rows
DEADLOCK, UNFINISHED, UNFENCED = "deadlock", "on its way at the end", "without a fence"
BOTH, WRONG, NOT_DUE, NO_FENCE = (dict.fromkeys(adversary.SCHEDULES, x) for x in (DEADLOCK, "wrong values", "NaN", UNFENCED))
EARLY = {"early": "wrong values"}


class Mistake(NamedTuple):
    """``edits`` are texts that stand once in the module, and what replaces them. ``found`` is how, by schedule."""

    name: str
    edits: list[tuple[str, str]]
    found: dict[str, str]
    case: tuple = LONG
    check: object = gluon.check
    module: object = gluon_forward


WAIT_V = "            mbarrier.wait(shared.v_full.index(slot), phase)\n"
WAIT_V_AT_EDGE = "    " + WAIT_V
RELEASE = "            mbarrier.arrive(shared.empty.index(slot), count=1)\n"
WAIT_PRODUCTS = "            s, acc = warpgroup_mma_wait(0, deps=[s, adding])\n"
HAND_OUT = "    mbarrier.arrive(shared.item_full.index(slot), count=1)\n"
FIRST_TABLE = "    tables.index(at + FIRST).store(seen.first)\n"
RELEASE_Q = "            mbarrier.arrive(shared.q_empty.index(at), count=1)\n"
STAGE_OUT = "            queries.store(result.to(dtype))\n"
WAIT_K_EMPTY = "    mbarrier.wait(empty, phase, pred=(early >> slot & 1) == 0)\n"
WAIT_Q = "            mbarrier.wait(shared.q_full.index(at), buffer.phase)\n"
FENCE = "            fence_async_shared()\n"
TREE = ("deep tree", *PACKED[1:])
KEYS = ("every position", *PACKED[1:]), gluon.check_gradients, gluon_backward_keys
TURN = "        q, grads = shared.q.index(slot), shared.grads.index(slot)\n"
RELEASE_ROWS = "        mbarrier.arrive(shared.empty.index(slot), count=1)\n"
HAND_OUT_ROWS = "        mbarrier.arrive(shared.full.index(slot), count=1)\n"
STORE_LSE = "        tables.index(slot * TABLES + LSE).store(row_lse)\n"

MISTAKES = [
    Mistake("values wait for the wrong phase", [("mbarrier.wait(empty, phase)", "mbarrier.wait(empty, phase ^ 1)")], BOTH),
    Mistake("the values of the next stage", [("shared.v.index(slot), acc", "shared.v.index(place.slot), acc")], WRONG),
    Mistake("no wait for values", [(WAIT_V + "            adding", "            adding")], {"late": "wrong values"}),
    Mistake("a stage is empty when one group has read it", [("barriers(STAGES, 2)", "barriers(STAGES, 1)")], BOTH),
    Mistake("a stage is released before its products", [(WAIT_PRODUCTS + RELEASE, RELEASE + WAIT_PRODUCTS)], EARLY),
    Mistake("no wait for an empty stage", [(WAIT_K_EMPTY, ""), ("    mbarrier.wait(empty, phase)\n", "")], BOTH),
    Mistake("all keys are copied early", [("(is_early << slot)", "(1 << slot)")], BOTH),
    Mistake("fewer bytes than a block has", [("KEYS // SIZE * k_tiles", "k_tiles")], {"late": UNFINISHED}),
    Mistake(
        "an item is handed out before its tables are stored",
        [(FIRST_TABLE, HAND_OUT + FIRST_TABLE), (HAND_OUT + "    return", "    return")],
        {"early": DEADLOCK},
    ),
    Mistake("no wait for an empty item", [("    mbarrier.wait(shared.item_empty.index(slot), phase)\n", "")], BOTH, PACKED),
    Mistake("an item is empty when two have read it", [("barriers(BUFFERS, 3)", "barriers(BUFFERS, 2)")], BOTH, PACKED),
    Mistake("no wait for queries", [(WAIT_Q, "")], {"late": UNFINISHED}),
    Mistake(
        "queries are released before the result is staged", [(RELEASE_Q, ""), (STAGE_OUT, RELEASE_Q + STAGE_OUT)], EARLY, PACKED
    ),
    Mistake("whole blocks of own keys are left out", [("at + 2, own.full", "at + 2, own.full * 0")], WRONG, PACKED),
    Mistake("the verdict of one group", [(" + number(shared.numbers, VERDICT + 1)", "")], NOT_DUE, *NAN_IN_ONE_GROUP),
    Mistake("a verdict before both groups are done", [("barriers(1, 2)", "barriers(1, 1)")], BOTH, *NAN),
    Mistake(
        "values are checked before they are there",
        [(WAIT_V_AT_EDGE + "                values", "                values")],
        {"late": "NaN"},
        *NAN,
    ),
    Mistake("no fence after checked values", [("store(values)\n    " + FENCE, "store(values)\n")], NOT_DUE, *NAN),
    Mistake("no fence after the staged result", [("load(COPY)\n" + FENCE, "load(COPY)\n")], NOT_DUE, PACKED),
    Mistake("no wait for keys", [("    mbarrier.wait(shared.k_full.index(0), 0)\n", "")], {"late": UNFINISHED}, *KEYS),
    Mistake(
        "rows are released before their products",
        [(TURN, RELEASE_ROWS + TURN), (RELEASE_ROWS + "        place", "        place")],
        EARLY,
        *KEYS,
    ),
    Mistake(
        "rows are handed out before their tables are stored",
        [(STORE_LSE, HAND_OUT_ROWS + STORE_LSE), (HAND_OUT_ROWS + "        place", "        place")],
        EARLY,
        *KEYS,
    ),
    Mistake(
        "rows are empty when one group has read them",
        [("        barriers(STAGES, 2),\n    )", "        barriers(STAGES, 1),\n    )")],
        BOTH,
        *KEYS,
    ),
    Mistake("the second group's keys see what the first's do", [("n = n0 + part * GROUP", "n = n0")], WRONG, TREE, *KEYS[1:]),
    Mistake(
        "no fence after rows are made 0",
        [("(kept_grads)\n    fence_async_shared()\n", "(kept_grads)\n")],
        NOT_DUE,
        *KEYS,
    ),
    Mistake("no fence after the barriers", [("    fence_async_shared()\n    gl.warp", "    gl.warp")], NO_FENCE),
]


def with_edits(module, edits, path: Path):
    """The module, made of its source with the edits."""
    source = Path(module.__file__).read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"not once in {module.__name__}: {old}"
        source = source.replace(old, new)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(module.__name__, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def found(mistake):
    """In words; None if nothing was."""
    try:
        mistake.check(*mistake.case)
    except AssertionError as error:
        return "NaN" if "got nan" in str(error) else "wrong values"
    except Exception as error:
        return next((words for words in (DEADLOCK, UNFINISHED, UNFENCED) if words in str(error)), str(error)[:200])
    return None


@pytest.mark.parametrize("schedule", adversary.SCHEDULES)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake(mistake, schedule, monkeypatch, tmp_path, record_property):
    name = mistake.module.__name__.rpartition(".")[2]
    wrong = with_edits(mistake.module, mistake.edits, tmp_path / f"{name}.py")
    monkeypatch.setenv("QUIETSTAR_GLUON", "1")
    monkeypatch.setattr(wrong, "processors", lambda device: 2, raising=False)
    monkeypatch.setattr(thought_attention, name, wrong)
    monkeypatch.setattr(adversary, "schedule", schedule)
    how = found(mistake)
    record_property("mistake", (mistake.name, schedule, how))
    assert how == mistake.found.get(schedule)


def test_each_mistake_is_found():
    assert all(any(mistake.found.values()) for mistake in MISTAKES)
