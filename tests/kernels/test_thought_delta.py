"""thought_delta and its decoding: against the specification on random layouts, errors, leaks, NaN, growth, refusals."""

import random
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from quietstar_kernels import (
    DeltaRows,
    ThoughtLayout,
    advance_states,
    anchor_states,
    text_states,
    thought_delta,
    thought_delta_decode,
)
from quietstar_kernels.branches import LENGTH, START
from quietstar_kernels.checks import on_host
from quietstar_kernels.delta import matmul
from quietstar_kernels.testing import LAYOUT_KINDS, assert_op_close_as_plain, random_layout
from tests.kernels.drawn import normal, seeded
from tests.kernels.test_trees import random_tree

KINDS = [kind for kind in LAYOUT_KINDS if kind != "any_lo"] + ["packed"] * 3  # any_lo is no sequence of documents
# A handful in the quick tests, all 500 in the whole matrix.
SEEDS = [range(10), *(pytest.param(range(i, i + 49), marks=pytest.mark.kernels) for i in range(10, 500, 49))]
LEAK_SEEDS = [range(9), pytest.param(range(9, 99), marks=pytest.mark.kernels)]


def draw_layout(seed, text=(5, 12, 100), rows=(3, 5, 70)):
    """Every fourth is a tree."""
    draw = random.Random(seed)
    if seed % 4 == 3:
        return random_tree(draw, own="causal")
    kind = KINDS[seed % len(KINDS)]
    return random_layout(seeded(seed), kind, max_text=draw.choice(text), max_rows=draw.choice(rows))


def draw_inputs(seed, layout, dtype=torch.float64, decay=None):
    """q, k, v, g and beta, with all options."""
    draw, generator = random.Random(seed), seeded(seed)
    (G, H), (K, E) = draw.choice([(1, 1), (2, 2), (1, 3), (2, 4)]), draw.choice([(4, 4), (5, 3), (1, 2), (8, 16)])
    make = partial(normal, generator, layout.B)
    g = -make(H, layout.M, *([K] if draw.random() < 0.35 else [])).abs() * (decay or draw.choice([0.1, 1, 10]))
    inputs = {
        "q": make(G, layout.M, K, dtype=dtype),
        "k": normalize(make(G, layout.M, K, dtype=dtype), dim=-1),
        "v": make(H, layout.M, E, dtype=dtype),
        "g": g.to(torch.promote_types(dtype, torch.float32)),
        "beta": make(H, layout.M, dtype=dtype).sigmoid() * 1.5 if draw.random() < 0.7 else None,
    }
    return inputs


def ways(layout):
    return ["states"] if layout.parent is not None else ["reads", "states"]


def take(inputs, rows):
    return {name: x if x is None else x[:, :, rows] for name, x in inputs.items()}


def after_text(backend, layout, **inputs):
    """The op in two calls: the text first, then the branches after what it left."""
    alone = ThoughtLayout.at(layout.anchor[:, :0], 1, 1, lo=layout.lo)
    L = layout.L
    text = take(inputs, slice(L))
    out, w = thought_delta(**text, layout=alone, backend=backend)
    rows = DeltaRows(text["k"], w, text["g"])
    own_out, own_w = thought_delta(**take(inputs, slice(L, None)), layout=layout, text=rows, backend=backend)
    return torch.cat([out, own_out], 2), torch.cat([w, own_w], 2)


def results(op, inputs, rows=None):
    """out, w, and the gradients of a random sum over both, or over some ``rows`` of them."""
    leaves = {name: x if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = dict(zip(("out", "w"), op(**leaves), strict=True))
    wanted = {name: x for name, x in leaves.items() if x is not None}
    chosen = [x if rows is None else x.where(rows, 0) for x in outputs.values()]
    loss = sum((x * normal(seeded(i), *x.shape, dtype=x.dtype)).sum() for i, x in enumerate(chosen))
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {name: x.detach() for name, x in outputs.items()} | dict(zip(wanted, grads, strict=True))


def assert_same(got, want, what, bound=1e-12):
    for name, x in want.items():
        assert got[name].shape == x.shape, f"{what} {name}"
        error = float((got[name] - x).abs().max()) if x.numel() else 0.0
        assert error <= bound * max(1.0, float(x.abs().max()) if x.numel() else 0.0), f"{what} {name}: {error}"


@pytest.fixture
def take_way(monkeypatch):
    return lambda way: monkeypatch.setattr(matmul, "way", lambda *_: way)


@pytest.fixture
def draw_tables(monkeypatch):
    """Half of the layouts get tables as they are on a GPU, of which the host knows no value."""

    def draw(seed):
        host = random.Random(-seed - 1).random() < 0.5
        monkeypatch.setattr(matmul, "known", lambda x: host and on_host(x))

    return draw


@pytest.mark.parametrize("seeds", SEEDS)
def test_random_layouts(seeds, take_way, draw_tables):
    for seed in seeds:
        draw_tables(seed)
        layout = draw_layout(seed)
        inputs = draw_inputs(seed, layout)
        op = after_text if seed % 3 == 0 else thought_delta
        want = results(partial(thought_delta, layout=layout, backend="reference"), inputs)
        for way in ways(layout):
            take_way(way)
            assert_same(results(partial(op, layout=layout, backend="matmul"), inputs), want, f"seed {seed} {way}")


def long_text(L=200):
    """Documents that cross chunks, several in one, one long branch among short ones."""
    lo = torch.zeros(1, L, dtype=torch.int32)
    for start in (40, 45, 46, 63, 64, 160):
        lo[:, start:] = start
    anchors = torch.tensor([[0, 39, 40, 63, 63, 64, 150, 159, 160, L - 1]])
    return ThoughtLayout.packed(anchors, torch.tensor([[3, 0, 70, 1, 33, 2, 32, 5, 1, 64]]), lo=lo)


@pytest.mark.parametrize("decay", [0.0, 0.3, 50.0])
def test_long_texts_and_strong_decays(decay, take_way):
    layout = long_text()
    for seed in range(4):
        inputs = draw_inputs(seed, layout, decay=decay or 1.0)
        inputs["g"] = inputs["g"] * (decay > 0)
        want = results(partial(thought_delta, layout=layout, backend="reference"), inputs)
        for way in ways(layout):
            take_way(way)
            assert_same(results(partial(thought_delta, layout=layout, backend="matmul"), inputs), want, f"{seed} {way}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.1, 1.0, 50.0])
def test_error_rule(dtype, decay, take_way):
    for seed in range(8):
        layout = long_text() if seed == 0 else draw_layout(seed, rows=(3, 40))
        inputs = draw_inputs(seed, layout, dtype, decay)
        grads = [normal(seeded(i), layout.B, inputs["v"].shape[1], layout.M, inputs["v"].shape[3]) for i in range(2)]
        for way in ways(layout):
            take_way(way)
            ops = (partial(thought_delta, backend=backend) for backend in ("matmul", "reference"))
            assert_op_close_as_plain(*ops, inputs, grads, f"seed {seed} {way}", layout=layout)


def seen_by_row(layout, b, row):
    """bool [M]: the rows that come after ``row`` on their paths, and itself."""
    return layout.dense_mask()[b, :, row]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e4])
@pytest.mark.parametrize("by", ["reference", "matmul"])
@pytest.mark.parametrize("seeds", LEAK_SEEDS)
def test_a_row_changes_only_those_after_it(seeds, by, value, take_way):
    """NaN makes them NaN, and nothing else moves by a bit, forward or backward."""
    for seed in seeds:
        draw, layout = random.Random(seed), draw_layout(seed)
        inputs = draw_inputs(seed, layout)
        name = draw.choice([name for name, x in inputs.items() if x is not None])
        on = torch.cat([torch.ones_like(layout.lo, dtype=torch.bool), layout.branches.live()], 1).nonzero().tolist()
        if not on:
            continue
        b, row = draw.choice(on)
        heads, H = inputs[name].shape[1], inputs["v"].shape[1]
        head = draw.randrange(heads)
        bad = inputs | {name: inputs[name].clone()}
        if value == value and name == "g":
            bad[name][b, head, row] = -torch.inf if value < 0 else -3.0
        else:
            bad[name][b, head, row] = value
        hit = torch.zeros(layout.B, H, layout.M, 1, dtype=torch.bool)
        after = seen_by_row(layout, b, row) if name != "q" else torch.arange(layout.M) == row
        hit[b, head * H // heads : (head + 1) * H // heads, after] = True
        for way in ways(layout):
            take_way(way)
            op = partial(after_text if seed % 3 == 0 else thought_delta, layout=layout, backend=by)
            want, got = (results(op, x, ~hit) for x in (inputs, bad))
            for output in ("out", "w"):
                gone = hit & (value != 1e4) & (name != "q" or output == "out")
                assert torch.equal(got[output].isnan(), gone.expand_as(got[output])), f"seed {seed} {name} {output} {way}"
                assert torch.equal(got.pop(output).where(~hit, 0), want.pop(output).where(~hit, 0)), f"seed {seed} {name} {way}"
            assert_same(got, want, f"seed {seed} {name} {way}", 0)


@pytest.mark.parametrize("by", ["reference", "matmul"])
@pytest.mark.parametrize("seeds", LEAK_SEEDS)
def test_rows_that_are_off(seeds, by, take_way):
    for seed in seeds:
        layout = draw_layout(seed)
        inputs = draw_inputs(seed, layout)
        off = ~torch.cat([torch.ones_like(layout.lo, dtype=torch.bool), layout.branches.live()], 1)[:, None, :, None]
        bad = {n: x if x is None else x.masked_fill(off if x.ndim == 4 else off[..., 0], torch.nan) for n, x in inputs.items()}
        for way in ways(layout):
            take_way(way)
            op = partial(thought_delta, layout=layout, backend=by)
            want, got = results(op, inputs), results(op, bad)
            assert_same(got, want, f"seed {seed}", 0)
            assert all((x * (off if x.ndim == 4 else off[..., 0])).abs().sum() == 0 for x in got.values())


class Steps:
    """The branches of a layout row by row, from tensors of all packed rows."""

    def __init__(self, layout, inputs, w):
        self.layout, self.inputs, L = layout, inputs, layout.L
        self.w = w
        self.text = DeltaRows(inputs["k"][:, :, :L], w[:, :, :L], inputs["g"][:, :, :L])
        self.states = text_states(self.text, layout.lo)
        table = layout.branches.table
        self.S = layout.S if layout.packed_rows is None else max(1, int(table[..., LENGTH].max()) if table.numel() else 1)
        s = torch.arange(self.S)
        self.on = (s < table[..., LENGTH, None])[:, None]
        self.row = (L + table[..., START, None].long() + s).where(self.on[:, 0], 0)

    def rows(self, x):
        """[B,*,C,S,*]; 0 where a row is off."""
        found = x.transpose(1, 2)[torch.arange(len(x))[:, None, None], self.row].movedim(3, 1)
        return found.where(self.on if x.ndim == 3 else self.on[..., None], 0)

    def step(self, s, own):
        now = {name: x if x is None else self.rows(x)[:, :, :, int(s)] for name, x in self.inputs.items()}
        return thought_delta_decode(**now, text=self.text, states=self.states, own=own, layout=self.layout, step=s)

    def written(self, s):
        """What rows before s left; all in a tree, but those of the nodes that are on."""
        rows = DeltaRows(self.rows(self.inputs["k"]), self.rows(self.w), self.rows(self.inputs["g"]))
        if self.layout.parent is not None:
            return rows
        return DeltaRows(*(x.index_fill(3, torch.arange(s, self.S), 0) for x in rows))


def decoded(layout, inputs):
    """What the op gives for each step and branch, and what decoding gives, by rereading and from states."""
    out, w = thought_delta(**inputs, layout=layout, backend="reference")
    steps = Steps(layout, inputs, w)
    want = torch.cat([steps.rows(out), steps.rows(w)], -1)
    state = None if layout.parent is not None else anchor_states(steps.text, steps.states, layout)
    found = []
    for s in range(steps.S):
        step = torch.tensor(s) if s % 2 else s
        ways = [steps.written(s)] + ([] if state is None else [state])
        found.append([torch.cat(steps.step(step, own), -1) for own in ways])
    return want, [torch.stack(x, 3) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("seeds", LEAK_SEEDS)
def test_decode_is_the_op_row_by_row(seeds, draw_tables):
    """Also where a row is NaN, which then changes no other branch by a bit."""
    for seed in seeds:
        draw_tables(seed)
        draw, layout = random.Random(seed), draw_layout(seed, rows=(3, 5))
        inputs = draw_inputs(seed, layout)
        want, found = decoded(layout, inputs)
        for got in found:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda m, seed=seed: f"seed {seed}: {m}")
        if layout.B * layout.M:
            name = draw.choice([name for name, x in inputs.items() if x is not None])
            bad = inputs | {name: inputs[name].clone()}
            bad[name][draw.randrange(layout.B), 0, draw.choice([draw.randrange(layout.M), layout.L // 2])] = torch.nan
            want, spoiled = decoded(layout, bad)
            for got, clean in zip(spoiled, found, strict=True):
                assert torch.equal(got.isnan(), want.isnan()), f"seed {seed} {name}"
                assert torch.equal(got.where(~got.isnan(), 0), clean.where(~got.isnan(), 0)), f"seed {seed} {name}"


def test_states_of_a_growing_text():
    for seed in range(6):
        layout = long_text() if seed % 2 else ThoughtLayout.from_padding(torch.ones(2, 70).triu(5).int(), 1, 2)
        inputs = draw_inputs(seed, layout)
        rows = DeltaRows(inputs["k"], thought_delta(**inputs, layout=layout)[1], inputs["g"])
        text = DeltaRows(*(x[:, :, : layout.L] for x in rows))
        grown, want = DeltaRows(*map(torch.zeros_like, text)), text_states(text, layout.lo)
        states = torch.zeros_like(want)
        for t in range(layout.L):
            for x, y in zip(grown, text, strict=True):
                x[:, :, t] = y[:, :, t]
            advance_states(grown, states, layout.lo, torch.tensor([t]))
        torch.testing.assert_close(states, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["reference", "matmul"])
@pytest.mark.parametrize(
    "layout",
    [
        ThoughtLayout.every_position(0, 3, 1, 2),
        ThoughtLayout.every_position(1, 0, 1, 2),
        ThoughtLayout.at(torch.zeros(2, 0).long(), 1, 2, text_length=5),
        ThoughtLayout.packed(torch.zeros(1, 0).long(), torch.zeros(1, 0).long(), text_length=5, rows=3),
        ThoughtLayout.packed(torch.full((1, 2), -1), torch.zeros(1, 2).long(), text_length=5, rows=3),
        ThoughtLayout.tree(*torch.tensor([[[-1, -1]], [[-1, -1]], [[0, 0]]]), text_length=5, rows=3),
        ThoughtLayout.packed(torch.zeros(1, 0).long(), torch.zeros(1, 0).long(), text_length=0),
        ThoughtLayout.every_position(1, 1, 1, 1),
    ],
    ids=["B=0", "L=0", "P=0", "C=0", "unused", "empty tree", "nothing", "one"],
)
def test_edges(by, layout, take_way):
    inputs = draw_inputs(5, layout)
    want = results(partial(thought_delta, layout=layout, backend="reference"), inputs)
    for way in ways(layout):
        take_way(way)
        for op in (thought_delta, after_text):
            assert_same(results(partial(op, layout=layout, backend=by), inputs), want, way)
    want, found = decoded(layout, inputs)
    for got in found:
        torch.testing.assert_close(got, want)


def test_the_choice():
    assert matmul.way(ThoughtLayout.every_position(1, 4, 1, 64), 64) == "reads"
    assert matmul.way(ThoughtLayout.every_position(1, 4, 1, 65), 64) == "states"
    assert matmul.way(ThoughtLayout.every_position(1, 4, 1, 32), 64, channels=True) == "states"
    ragged = ThoughtLayout.packed(torch.zeros(1, 9).long(), torch.tensor([[40] + [1] * 8]), text_length=4)
    assert matmul.way(ragged, 64) == "states"
    assert matmul.way(ThoughtLayout.tree(*torch.tensor([[[3, 0]], [[-1, 0]], [[2, 2]]]), text_length=4), 64) == "states"


def few_anchors(channels, seed=1):
    layout = ThoughtLayout.at(torch.tensor([[2, 9, 30, 33]]), 2, 3, text_length=40)
    inputs = draw_inputs(seed, layout)
    g = inputs["g"] if inputs["g"].ndim == 3 else inputs["g"][..., 0]
    return layout, inputs | {"g": g[..., None] * torch.arange(1, inputs["k"].shape[3] + 1) if channels else g}


@pytest.mark.kernels
@pytest.mark.parametrize("channels", [False, True])
def test_one_compiled_graph(channels):
    layout, inputs = few_anchors(channels)
    compiled = torch.compile(lambda **x: thought_delta(**x, layout=layout), backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, inputs), results(partial(thought_delta, layout=layout), inputs), "compiled")


@pytest.mark.parametrize("channels", [False, True])
def test_no_value_is_read(channels):
    """On fake tensors, so a CUDA graph can capture it: the op where it reads, and each function of decoding."""
    layout, inputs = few_anchors(channels)
    steps = Steps(layout, inputs, thought_delta(**inputs, layout=layout)[1])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: x if x is None else mode.from_tensor(x) for name, x in inputs.items()}
        layout = ThoughtLayout.at(mode.from_tensor(layout.anchor), 2, 3, lo=mode.from_tensor(layout.lo))
        assert results(partial(thought_delta, layout=layout), inputs)["out"].shape == steps.w.shape
        text, own = (DeltaRows(*map(mode.from_tensor, rows)) for rows in (steps.text, steps.written(0)))
        states, step = text_states(text, layout.lo), mode.from_tensor(torch.tensor(1))
        now = {name: x if x is None else x[:, :, :8] for name, x in inputs.items()}
        for kept in (own, anchor_states(text, states, layout)):
            thought_delta_decode(**now, text=text, states=states, own=kept, layout=layout, step=step)
        advance_states(text, states, layout.lo, mode.from_tensor(torch.tensor([7])))


@pytest.mark.parametrize("channels", [False, True])
def test_vmap(channels):
    layout, inputs = few_anchors(channels)
    several = torch.stack([inputs["v"], 2 * inputs["v"], inputs["v"].index_fill(2, torch.tensor(3), torch.nan)])
    got = torch.func.vmap(lambda v: thought_delta(**(inputs | {"v": v}), layout=layout)[0])(several)
    want = torch.stack([thought_delta(**(inputs | {"v": v}), layout=layout)[0] for v in several])
    torch.testing.assert_close(got, want, equal_nan=True)


def test_refusals():
    layout = ThoughtLayout.every_position(1, 4, 1, 2)
    tree = ThoughtLayout.tree(*torch.tensor([[[3, 0]], [[-1, 0]], [[2, 2]]]), text_length=4)
    x = {"q": torch.ones(1, 2, 12, 3), "k": torch.ones(1, 2, 12, 3), "v": torch.ones(1, 4, 12, 5)}
    x |= {"g": torch.zeros(1, 4, 12), "beta": torch.ones(1, 4, 12)}
    wrong = [
        (x | {"v": torch.ones(1, 4, 11, 5)}, layout, r"v must have shape \[B,H,M,E\]"),
        (x | {"g": torch.zeros(1, 4, 12, 2)}, layout, r"g must have shape \[B,H,M,K\]"),
        (x | {"v": torch.ones(1, 3, 12, 5), "g": torch.zeros(1, 3, 12), "beta": None}, layout, "H must be a multiple of G"),
        (x | {"q": x["q"].long()}, layout, "q must have dtype"),
        (x, ThoughtLayout.every_position(1, 4, 1, 2, own="full"), "layout must have own=.causal."),
        (x, ThoughtLayout.at(layout.anchor, 1, 2, lo=torch.tensor([[0, 1, 0, 0]])), "lo must be the start of a document"),
        (x | {"backend": "triton"}, layout, "backend must be one of"),
        (x | {"text": DeltaRows(x["k"], x["v"], x["g"])}, layout, r"v must have shape \[B,H,R,E\]"),
    ]
    for arguments, where, message in wrong:
        with pytest.raises(ValueError, match=f"thought_delta: {message}"):
            thought_delta(**arguments, layout=where)
    text = DeltaRows(x["k"][:, :, :4], x["v"][:, :, :4], x["g"][:, :, :4])
    own = DeltaRows(torch.zeros(1, 2, 4, 2, 3), torch.zeros(1, 4, 4, 2, 5), torch.zeros(1, 4, 4, 2))
    x = {name: y[:, :, :4] for name, y in x.items()} | {"text": text, "own": own, "step": 1, "layout": layout}
    x["states"] = text_states(text, layout.lo)
    in_tree = {name: y[:, :, :2] if isinstance(y, torch.Tensor) else y for name, y in x.items()} | {"layout": tree}
    in_tree["states"] = x["states"]
    wrong = [
        ({"step": 2}, "step must be from 0 to S-1=1"),
        ({"states": x["states"][:, :1]}, r"states must have shape \[B,H,n,K,E\]"),
        ({"own": own._replace(w=own.w[:, :, :, :1])}, r"own.w must have shape"),
        ({"own": torch.zeros(1, 4, 4, 3, 5).double()}, "own must have dtype float32"),
        (in_tree | {"own": torch.zeros(1, 4, 2, 3, 5)}, "own must be DeltaRows in a tree"),
        (in_tree | {"own": DeltaRows(*(y[:, :, :2, :1] for y in own)), "step": 0}, "own must hold all rows"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"thought_delta_decode: {message}"):
            thought_delta_decode(**(x | change))
