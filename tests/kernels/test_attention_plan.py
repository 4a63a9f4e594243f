"""Counts the arithmetic of thought_attention: how much more than the useful products its tiles compute."""

import functools
import itertools

import pytest
import torch

from benchmarks.peers.branches import BranchCase
from quietstar_kernels import ThoughtLayout, reference
from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.branches import ANCHOR, LENGTH
from quietstar_kernels.testing import attention_inputs, random_layout

pytest.importorskip("triton")

from attention_backward_plan import backward_plan  # noqa: E402
from attention_plan import forward_plan  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from quietstar_kernels.triton import configs  # noqa: E402
from quietstar_kernels.triton._target import INTERPRETED  # noqa: E402
from quietstar_kernels.triton.thought_attention.backward import thought_attention_backward  # noqa: E402
from quietstar_kernels.triton.thought_attention.backward_keys import configs_of  # noqa: E402
from quietstar_kernels.triton.thought_attention.forward import config_of, thought_attention  # noqa: E402

LENGTHS = (256, 512, 1024, 4096)
THOUGHTS = ((1, 8), (2, 12), (2, 14), (4, 16), (8, 32))  # N, S
GROUPS = (1, 4, 8)
BACKWARD_TABLES = (
    configs.ATTENTION_BACKWARD_QUERIES,
    configs.ATTENTION_BACKWARD_TEXT_KEYS,
    configs.ATTENTION_BACKWARD_OWN_KEYS,
)


def hopper(table):
    """The tiles of sm_90 for bf16 and heads of width 128."""
    return table["sm_90", 2, 128].blocks


def forward_waste(layout, group, seen):
    """Computed products over useful ones; each score takes two, of widths K and E."""
    return forward_plan(layout, group, hopper(configs.ATTENTION_FORWARD), query_rows="thoughts").scores() / seen


def backward_waste(layout, group, seen):
    """Computed products over useful ones, five per score. Two kernels without atomics compute at least seven: 1.4."""
    plan = backward_plan(layout, group, *map(hopper, BACKWARD_TABLES), query_rows="thoughts")
    return plan.products(128, 128) / (5 * 128 * seen)


def account(waste, record_property):
    """{(H/G, L): [waste for each of THOUGHTS]} of thought rows at P = L; also printed."""
    table = {}
    for group, L in itertools.product(GROUPS, LENGTHS):
        cases = [(ThoughtLayout.every_position(1, L, N, S), group * N * S * L * (L + S + 2) // 2) for N, S in THOUGHTS]
        table[group, L] = [waste(layout, group, seen) for layout, seen in cases]
    lines = [
        f"{waste.__name__}, tiles of sm_90 at K 128",
        "  H/G     L" + "".join(f"{f'N {N} S {S}':>11}" for N, S in THOUGHTS),
    ]
    lines += [f"  {group:>3} {L:>5}" + "".join(f"{x:>11.3f}" for x in row) for (group, L), row in table.items()]
    record_property("table", "\n".join(lines))
    return table


def test_waste_of_the_forward(record_property):
    """Own keys are padded to a block of the tile, which costs products and saves instructions."""
    for (group, L), row in account(forward_waste, record_property).items():
        assert max(row) <= (2.6 if group == 1 else 1.25 if L >= 1024 else 1.7), f"H/G {group}, L {L}"
        assert min(row) >= 1


def test_waste_of_the_backward(record_property):
    for (group, L), row in account(backward_waste, record_property).items():
        assert min(row) >= 1.4, f"H/G {group}, L {L}"


def prompts(lengths, branches, shortest, longest):
    """A layout of prompts of these lengths, one after another, with as many branches each on its last position."""
    ends = torch.tensor(lengths).cumsum(0)
    lo = torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))[None]
    anchors = (ends - 1).repeat_interleave(branches)[None]
    rows = torch.randint(shortest, longest + 1, anchors.shape, generator=torch.Generator().manual_seed(0))
    return ThoughtLayout.packed(anchors, rows, lo=lo)


BRANCHES = {  # the most products over useful ones, forward, by H/G
    **{
        f"prompt {L}, 8 of {S}": (BranchCase(L=L, S=S).layout, dict.fromkeys(GROUPS, 1.15))
        for L in (512, 2048)
        for S in (256, 1024)
    },
    # With H/G 1, a quarter of the tiles of 128 rows hold the end of a branch and the start of the next.
    "4 prompts of 300 to 1200, 8 of 256 to 700": (prompts([300, 700, 512, 1200], 8, 256, 700), {1: 1.2, 4: 1.15, 8: 1.15}),
    "drafter, 256 of 16": (BranchCase(grid="drafter", L=4096, C=256, S=16).layout, {1: 1.6, 4: 1.25, 8: 1.2}),
}


def useful(layout):
    """Scores of the branch rows for one query head."""
    branches = layout.branches
    own = branches.column(LENGTH) if branches.full else branches.row_in_branch() + 1
    text = layout.text_position_ids().gather(1, branches.column(ANCHOR)) + 1
    return int(((text + own) * branches.live()).sum())


def test_waste_of_branches(record_property, monkeypatch):
    """Own rows that all rows of a tile see are not masked, so long branches waste no more than text."""
    monkeypatch.setattr(configs, "target", lambda: "sm_90")
    options = AttentionOptions(1.0, None, None, None)
    lines = ["waste of branches, tiles of sm_90 at K 128", f"{'forward backward':>67}"]
    for (name, (layout, most)), group in itertools.product(BRANCHES.items(), GROUPS):
        seen = group * useful(layout)
        forward = forward_plan(layout, group, config_of(layout.branches, options, 2, 128).blocks, query_rows="thoughts")
        tables = hopper(BACKWARD_TABLES[0]), *(x.blocks for x in configs_of(layout.branches, 8, options, 2, 128))
        backward = backward_plan(layout, group, *tables, query_rows="thoughts").products(128, 128) / (5 * 128 * seen)
        lines.append(f"  {name:<42} H/G {group} {forward.scores() / seen:>8.3f} {backward:>8.3f}")
        assert 1 <= forward.scores() / seen <= most[group] and backward >= 1.4, lines[-1]
    record_property("table", "\n".join(lines))


@pytest.fixture
def products(monkeypatch):
    """The multiplications of each dot that the interpreter runs."""
    counted = []
    dot = InterpreterBuilder.create_dot

    @functools.wraps(dot)
    def count(self, a, b, *rest):
        counted.append(a.data.size * b.data.shape[-1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    return counted


def packed(anchors, lengths, *rest, **more):
    return ThoughtLayout.packed(torch.tensor(anchors), torch.tensor(lengths), *rest, **more)


RAGGED = ThoughtLayout.at(torch.arange(36)[None], 1, 20, 36, length=torch.arange(36)[None, :, None] % 21)
LAYOUTS = {
    "every": (ThoughtLayout.every_position(2, 40, 2, 5), {}),
    "left padding, window": (ThoughtLayout.from_padding(torch.arange(70) >= torch.tensor([[12], [0]]), 1, 3), {"window": 40}),
    "documents": (ThoughtLayout.from_documents((torch.arange(80) // 40)[None], 3, 4, torch.arange(80)[None, ::7]), {}),
    "ragged": (RAGGED, {"query_rows": "thoughts"}),
    "any lo, window": (random_layout(torch.Generator().manual_seed(6), "any_lo", 2, 60, 2, 5), {"window": 30}),
    "branches": (packed([[9, 9, 35]], [[50, 0, 41]], 40, rows=100), {"query_rows": "thoughts"}),
    "full branches, window": (packed([[9, 39], [20, -1]], [[60, 23], [41, 0]], 40, own="full"), {"window": 50}),
}


@pytest.mark.skipif(not INTERPRETED, reason="counts what Triton's interpreter runs")
@pytest.mark.parametrize("group", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_plan_is_what_runs(name, group, products):
    layout, options = LAYOUTS[name]
    options = {"window": None, "query_rows": "all"} | options
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, 2 * group, 2, 24, 40, query_rows=options["query_rows"])
    sinks = inputs.pop("sinks")
    thought_attention(branches=layout.branches, options=AttentionOptions(1.0, options["window"], None, sinks), **inputs)
    blocks = configs.pick(configs.ATTENTION_FORWARD, 4, 40).blocks
    plan = forward_plan(layout, group, blocks, **options)
    assert plan.full.sum() and plan.edge.sum() and plan.own.sum()
    assert sum(products) == 2 * plan.scores() * (32 + 64)  # K 24 and E 40, padded


@pytest.mark.skipif(not INTERPRETED, reason="counts what Triton's interpreter runs")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "documents" else name for name in LAYOUTS]
)
def test_backward_plan_is_what_runs(name, products):
    layout, options = LAYOUTS[name]
    options = {"window": None, "query_rows": "all"} | options
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, 6, 2, 24, 40, query_rows=options["query_rows"])
    q, k, v, _ = inputs.values()
    rest = (layout.branches, AttentionOptions(1.0, options["window"], None, None))
    out, lse = reference.thought_attention(q, k, v, *rest)
    thought_attention_backward(out, q, k, v, out, lse, *rest)
    plan = backward_plan(layout, 3, *(configs.pick(table, 4, 40).blocks for table in BACKWARD_TABLES), **options)
    assert plan.queries and plan.text_keys and plan.own_keys
    assert sum(products) == 2 * plan.products(32, 64)  # K 24 and E 40, padded


def test_plan_counts_blocks():
    """By hand: tiles of 32 flat rows, 16 rows of two heads, against 40 positions of text."""
    layout = ThoughtLayout.every_position(1, 40, 1, 4)
    plan = forward_plan(layout, 2, {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_EDGE": 8})
    thoughts, text = slice(0, 10), slice(10, None)  # a tile has the thoughts of four positions; there are 2.5 tiles of text
    assert plan.own[0, thoughts].tolist() == [2] * 10 and plan.own[0, text].tolist() == [0] * 3
    smallest = torch.arange(0, 40, 4)  # position of a tile's first thought; the last one is at smallest + 3
    full = (smallest + 1) // 16
    assert torch.equal(plan.full[0, thoughts], full)
    assert torch.equal(plan.edge[0, thoughts], -(-(smallest + 4 - 16 * full) // 8))
    assert plan.full[0, text].tolist() == [0, 1, 2] and plan.edge[0, text].tolist() == [2, 2, 1]
