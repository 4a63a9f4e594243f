"""The kernels in Gluon, in every layout and with every option, under a schedule that ``--schedule`` names."""

import itertools

import adversary
import pytest
import torch

from quietstar_kernels import ThoughtLayout, reference, thought_attention
from quietstar_kernels.testing import (
    assert_op_close_as_plain,
    attention_inputs,
    attention_magnitudes,
    forward_backward,
    plain_attention,
)
from quietstar_kernels.triton import thought_attention as op
from quietstar_kernels.triton.thought_attention import backward_keys, gluon_forward
from tests.kernels.conftest import nan_in_new_tensors  # noqa: F401
from tests.kernels.drawn import normal, seeded
from tests.kernels.test_thought_attention_leaks import poisoned, scrambled

FORWARD, KEYS = "gluon_attention_forward", "gluon_attention_text_keys"
BF16, FP16 = torch.bfloat16, torch.float16


def documents():
    """Two texts of documents, the second with padding; thoughts of unequal length at every third position."""
    ids = torch.tensor([[0] * 37 + [1] * 50 + [2] * 63, [0] * 90 + [1] * 40 + [-1] * 20])
    anchors = torch.arange(0, 150, 3).repeat(2, 1)
    anchors[1, 43:] = -1
    layout = ThoughtLayout.from_documents(ids, 1, 4, anchors)
    length = torch.minimum(layout.length, torch.randint(0, 5, layout.length.shape, generator=seeded(0)))
    return ThoughtLayout.at(layout.anchor, 1, 4, lo=layout.lo, length=length)


def packed(own):
    anchors, lengths = torch.tensor([[49, 49, 80, 149], [3, 100, 100, -1]]), torch.tensor([[200, 33, 1, 150], [7, 0, 290, 0]])
    return ThoughtLayout.packed(anchors, lengths, text_length=150, rows=390, own=own)


def tree(*, deep):
    """Nodes of several tiles and of a few rows; ``deep``, on a path of four."""
    parents, lengths = ([-1, 0, 1, 2, 0, -1], [70, 1, 40, 9, 140, 5]) if deep else ([-1, 0, 0, -1], [150, 90, 0, 33])
    anchors = [66] + [-1] * (len(parents) - 2) + [70]
    return ThoughtLayout.tree(*torch.tensor([[anchors], [parents], [lengths]]), text_length=172)


LAYOUTS = {
    "every position": ThoughtLayout.every_position(2, 40, 2, 3),
    "documents": documents(),
    "packed": packed("causal"),
    "full": packed("full"),
    "tree": tree(deep=False),
    "deep tree": tree(deep=True),
    "a group without rows": ThoughtLayout.at(torch.tensor([[10, 20]]), 1, 32, 150, length=torch.tensor([[[0], [32]]])),
    "long": ThoughtLayout.at(torch.tensor([[300, 699]]), 1, 40, text_length=700),  # goes round the ring
}
OPTIONS = {
    "plain": {},
    "window": {"window": 50},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 141, "softcap": 3.0, "sinks": True, "scale": 0.3},
}
HEADS = [(2, 1), (1, 1), (3, 1), (4, 1), (6, 1), (4, 2)]  # H, G
KINDS = [(64, BF16), (128, BF16), (64, FP16), (128, FP16)]  # K, dtype
TURNS = zip(itertools.product(LAYOUTS, OPTIONS), itertools.cycle(HEADS), itertools.cycle([*KINDS, *reversed(KINDS)]))
CASES = [(*names, heads, kind, "thoughts" if i % 3 == 2 else "all") for i, (names, heads, kind) in enumerate(TURNS)]
ROWS = zip(KINDS[:2], ("all", "thoughts"), strict=True)
GRID = [("every position", "plain", heads, *kind_and_rows) for heads, kind_and_rows in itertools.product(HEADS, ROWS)]


# With all kernels, which take longer.
GRADIENTS = [
    ("every position", "plain", (2, 1), (64, BF16), "thoughts"),
    ("documents", "all", (3, 1), (64, FP16), "all"),
    ("full", "sinks", (1, 1), (128, FP16), "thoughts"),
    ("deep tree", "window", (2, 1), (64, BF16), "all"),
]
NOT_SERVED = {
    "K 96": {"width": 96, "dtype": BF16},
    "E 32": {"width": 64, "value_width": 32, "dtype": BF16},
    "fp32": {"width": 64, "dtype": torch.float32},
    "stride 0": {"width": 64, "dtype": BF16},
}


@pytest.fixture(autouse=True)
def in_gluon(monkeypatch):
    monkeypatch.setenv("QUIETSTAR_GLUON", "1")
    monkeypatch.setattr(gluon_forward, "processors", lambda device: 2)  # so that a program takes several tiles


@pytest.fixture
def served(launches):
    """A test must launch the kernels in Gluon, and none that they replace. Own keys have Triton's kernel."""
    before = launches.copy()
    yield
    found = launches - before
    assert found[FORWARD] and not found["attention_forward"] and found["attention_backward_keys"] == found[KEYS]


@pytest.fixture
def text_keys_alone(monkeypatch, launches):
    """Whatever else the gradients need is the reference's, which takes less time. A test must launch the kernel."""
    before, found = launches.copy(), {}
    row_tables = op.row_tables

    def tables(*given):
        found["given"] = given[:4]
        return row_tables(*given)

    def dq(inputs):
        grad_out, out, lse, grad_lse = found["given"]
        tensors = grad_out, inputs.q, inputs.k, inputs.v, out, lse, inputs.branches, inputs.options, grad_lse
        found["want"] = reference.thought_attention_backward(*tensors)
        return found["want"][0]

    def own_keys(inputs, ranges, dk, dv, parts, config):
        L = inputs.branches.L
        for got, want in zip((dk, dv), found["want"][1:3], strict=True):
            got[:, :, L:] = want[:, :, L:]

    for holder, name, function in (
        (op, "launch_forward", reference.thought_attention),
        (op, "row_tables", tables),
        (op, "query_gradient", dq),
        (backward_keys, "_launch", own_keys),
    ):
        monkeypatch.setattr(holder, name, function)
    yield
    assert (launches - before)[KEYS] and not (launches - before)["attention_backward_keys"]


def attention(q, k, v, layout, **options):
    return thought_attention(q, k, v, layout, return_lse=True, backend="triton", **options)


def drawn(layout, options, heads, kind, rows):
    """The layout and inputs of a case, and the op's options."""
    layout, options = LAYOUTS[layout], OPTIONS[options] | {"query_rows": rows}
    width, dtype = kind
    inputs = attention_inputs(seeded(0), layout, *heads, width, sinks="sinks" in options, query_rows=rows, dtype=dtype)
    return layout, inputs, {name: x for name, x in options.items() if name != "sinks"}


def check(*case, gradients=False):
    """The error rule of all back ends."""
    layout, inputs, options = drawn(*case)
    grads, magnitudes = (), None
    if gradients:
        grads = normal(seeded(1), *inputs["q"].shape, dtype=inputs["q"].dtype), normal(seeded(2), *inputs["q"].shape[:3])
        magnitudes = attention_magnitudes(inputs, grads[0], options.get("scale"))
    assert_op_close_as_plain(attention, plain_attention, inputs, grads, magnitudes=magnitudes, layout=layout, **options)


def check_gradients(*case):
    check(*case, gradients=True)


def run(layout, inputs, options, gradients=False):
    """Outputs [B,H,rows,..] and gradients, in one dict."""
    grads = [torch.ones_like(inputs["q"])] if gradients else []
    (out, lse), found = forward_backward(attention, inputs, grads, layout=layout, **options)
    return {"out": out, "lse": lse[..., None], **found}


def check_nan(place, *case, gradients=False):
    """NaN in the values of one row of the text, or of the last row of a branch: rows that see it are NaN, and no other changes
    by a bit. Keys and values that only such rows see get no gradient, and no other's is NaN."""
    layout, inputs, options = drawn(*case)
    row = layout.L // 3 if place == "text" else layout.L + int(layout.live().flatten(1)[0].nonzero()[-1])
    bad = (torch.arange(layout.M) == row).expand(layout.B, -1)
    want, got = (run(layout, x, options, gradients) for x in (inputs, poisoned(inputs, bad, ["v"])))
    sees = layout.dense_mask(options.get("window"))[:, None, layout.M - inputs["q"].shape[2] :, [row]]
    assert sees.any() and not sees.all()
    for name in ("out", "lse", *["q"] * gradients):
        assert torch.equal(got[name].isnan(), sees.expand_as(got[name])), f"{name} got nan in other rows than those that see it"
        assert torch.equal(got[name].where(~sees, 0), want[name].where(~sees, 0)), f"{name} of other rows"
    assert all(got[name].isfinite().all() for name in ("k", "v") if gradients), "got nan in a gradient of keys"


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("layout, options, heads, kind, rows", CASES + GRID, ids=str)
def test_error_rule(layout, options, heads, kind, rows):
    check(layout, options, heads, kind, rows)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("layout, options, heads, kind, rows", GRADIENTS, ids=str)
def test_gradients(layout, options, heads, kind, rows):
    check_gradients(layout, options, heads, kind, rows)


@pytest.mark.usefixtures("text_keys_alone")
@pytest.mark.parametrize("layout, options, heads, kind, rows", CASES, ids=str)
def test_gradients_of_text(layout, options, heads, kind, rows):
    check_gradients(layout, options, heads, kind, rows)


@pytest.mark.usefixtures("served")
def test_gradients_beside_nan():
    check_nan("text", "documents", "plain", (2, 1), (64, BF16), "all", gradients=True)


@pytest.mark.usefixtures("text_keys_alone")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_text_beside_nan(layout):
    check_nan("text", layout, "plain", (1, 1), KINDS[len(layout) % 4], "all", gradients=True)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("place", ["text", "branch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_that_a_row_sees(layout, place):
    check_nan(place, layout, "all" if layout == "documents" else "plain", (1, 1), KINDS[len(layout) % 4], "all")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("place, options, dtype", [("text", "window", BF16), ("branch", "plain", FP16)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_values_where_a_row_may_not_look(layout, place, options, dtype):
    """All that one row does not see is huge: the row stays bitwise the same."""
    layout, inputs, options = drawn(layout, options, (1, 1), (64, dtype), "all")
    row = layout.L // 2 if place == "text" else layout.L + int(layout.live().flatten(1).all(0).nonzero()[-1])
    hidden = ~layout.dense_mask(options.get("window"))[:, row]
    changed = {name: scrambled(inputs[name], hidden, seeded(row)) for name in ("k", "v")}
    want, got = (run(layout, x, options) for x in (inputs, inputs | changed))
    assert all(torch.equal(got[name][:, :, row], want[name][:, :, row]) for name in ("out", "lse"))


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("layout", ["documents", "deep tree"])
def test_bits_depend_neither_on_the_schedule_nor_on_strides(layout, monkeypatch):
    layout, inputs, options = drawn(layout, "all", (2, 2), (64, BF16), "all")
    apart = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")}
    found = []
    for schedule, given in zip(adversary.SCHEDULES, (inputs, inputs | apart), strict=True):
        monkeypatch.setattr(adversary, "schedule", schedule)
        found.append(run(layout, given, options))
    assert all(torch.equal(x, y) for x, y in zip(*(x.values() for x in found), strict=True))


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_served(name, launches):
    """Then the other kernels run."""
    layout, before = LAYOUTS["every position"], launches.copy()
    inputs = attention_inputs(seeded(0), layout, 2, 1, **NOT_SERVED[name])
    if name == "stride 0":
        inputs["k"] = inputs["k"][:1].expand_as(inputs["k"])
    assert_op_close_as_plain(attention, plain_attention, inputs, layout=layout)
    assert set(launches - before) == {"attention_forward"}
