"""ThoughtLayout compared with the definition, one row and one column at a time."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.utils import _apply_to_tensors
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from quietstar_kernels import ThoughtLayout, thought_attention
from quietstar_kernels.testing import LAYOUT_KINDS, attention_inputs, random_layout

SEEDS = range(12)


def rows_of(layout):
    """(p, n, s) of every packed row; None for text."""
    P, N, S = layout.P, layout.N, layout.S
    return [None] * layout.L + [(p, n, s) for p in range(P) for n in range(N) for s in range(S)]


def is_on(layout, b, row):
    p, n, s = row
    return int(layout.anchor[b, p]) >= 0 and s < int(layout.length[b, p, n])


def position(layout, b, index, row):
    """Position id of a packed row."""
    t = index if row is None else int(layout.anchor[b, row[0]])
    if row is not None and not is_on(layout, b, row):
        return 0
    return t - int(layout.lo[b, t]) + (0 if row is None else 1 + row[2])


def sees(layout, b, index, column, window):
    """The definition: a text row sees the text in [lo, t]; a thought row what its anchor sees, and its own earlier rows."""
    rows = rows_of(layout)
    row, other = rows[index], rows[column]
    if row is not None and not is_on(layout, b, row):
        return False
    t = index if row is None else int(layout.anchor[b, row[0]])
    if other is None:
        visible = int(layout.lo[b, t]) <= column <= t
    else:
        visible = row is not None and row[:2] == other[:2] and other[2] <= row[2]
    if visible and window is not None:
        visible = position(layout, b, column, other) > position(layout, b, index, row) - window
    return visible


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_split_and_predicting(kind):
    """Every row of a tensor of row numbers arrives at its (p, n, s); the last J rows of a thought predict."""
    for seed in SEEDS:
        layout = random_layout(torch.Generator().manual_seed(seed), kind)
        B, L, P, N, S = layout.B, layout.L, layout.P, layout.N, layout.S
        rows = torch.arange(layout.M).expand(B, -1)
        text, thoughts = layout.split(rows)
        assert torch.equal(text, torch.arange(L).expand(B, L))
        assert thoughts.shape == (B, P, N, S)
        for i, row in enumerate(rows_of(layout)[L:]):
            assert (thoughts[(slice(None), *row)] == L + i).all(), f"seed {seed}"
        strided = torch.stack([rows, -rows], 2)[..., None].expand(-1, -1, -1, 3)
        for lookahead in range(1, S + 1):
            assert torch.equal(layout.predicting(rows, lookahead), thoughts[..., S - lookahead :])
            assert torch.equal(layout.predicting(strided, lookahead)[..., 1, 2], -thoughts[..., S - lookahead :])


def target_of(layout, b, p, n, j, J, labels):
    """The label of the j-th of the J tokens after an anchor."""
    t = int(layout.anchor[b, p])
    ahead = t + j
    if not is_on(layout, b, (p, n, layout.S - J + j - 1)) or ahead >= layout.L or int(layout.lo[b, ahead]) > t:
        return -100
    return int(labels[b, ahead])


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_targets(kind):
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        layout = random_layout(generator, kind)
        labels = torch.randint(0, 80, (layout.B, layout.L), generator=generator)
        for J in range(1, layout.S + 1):
            got = layout.targets(labels.int(), J)
            assert got.shape == (layout.B, layout.P, layout.N, J) and got.dtype == torch.int64
            places = torch.cartesian_prod(*map(torch.arange, got.shape)).tolist()
            want = [target_of(layout, b, p, n, j + 1, J, labels) for b, p, n, j in places]
            assert got.flatten().tolist() == want, f"seed {seed}"


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_dense_mask_is_the_predicate(kind, window):
    for seed in SEEDS:
        layout = random_layout(torch.Generator().manual_seed(seed), kind, 2, 7, 2, 3)
        M = range(layout.M)
        want = [[[sees(layout, b, i, j, window) for j in M] for i in M] for b in range(layout.B)]
        assert torch.equal(layout.dense_mask(window), torch.tensor(want)), f"seed {seed}"


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_position_ids(kind):
    for seed in SEEDS:
        layout = random_layout(torch.Generator().manual_seed(seed), kind)
        rows = rows_of(layout)
        want = [[position(layout, b, i, row) for i, row in enumerate(rows)] for b in range(layout.B)]
        assert torch.equal(layout.position_ids(), torch.tensor(want)), f"seed {seed}"
        assert torch.equal(layout.text_position_ids(), torch.tensor(want)[:, : layout.L])


def token(layout, b, row, input_ids, thought_ids, T):
    """Token of a thought row: start, T sampled, end, then the text after the anchor; start 90, end 91, pad 92."""
    p, n, s = row
    t = int(layout.anchor[b, p])
    if t < 0:
        return 92
    if s == 0 or s == T + 1:
        return 90 if s == 0 else 91
    if s <= T:
        return int(thought_ids[b, p, n, s - 1])
    follows = t + s - T - 1
    return int(input_ids[b, follows]) if follows < layout.L else 92


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", LAYOUT_KINDS[:-1])
def test_token_ids(kind, dtype):
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        layout = random_layout(generator, kind, max_rows=4)
        layout = ThoughtLayout(layout.anchor, layout.lo, layout.length, layout.S + 2)
        T = seed % (layout.S - 1)
        input_ids = torch.randint(0, 80, (layout.B, layout.L), generator=generator).to(dtype)
        thought_ids = torch.randint(0, 80, (layout.B, layout.P, layout.N, T), generator=generator).to(dtype)
        want = [
            ids + [token(layout, b, row, input_ids, thought_ids, T) for row in rows_of(layout)[layout.L :]]
            for b, ids in enumerate(input_ids.tolist())
        ]
        got = layout.token_ids(input_ids, thought_ids, start_id=90, end_id=91, pad_id=92)
        assert torch.equal(got, torch.tensor(want)), f"seed {seed}"


def test_padding_gives_lo_and_length():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    layout = ThoughtLayout.from_padding(mask, thoughts=2, rows=3)
    assert layout.lo.tolist() == [[0, 1, 2, 2, 2], [0] * 5, [0, 1, 1, 1, 1], [0] * 5, [0] * 5]
    assert torch.equal(layout.length, (3 * mask)[:, :, None].expand(5, 5, 2))
    assert layout.anchor.tolist() == [list(range(5))] * 5
    chosen = ThoughtLayout.from_padding(mask.bool()[:2], 1, 3, anchors=torch.tensor([[1, 3], [2, -1]]))
    assert chosen.length[:, :, 0].tolist()[0] == [0, 3] and chosen.live().sum((1, 2, 3)).tolist() == [3, 3]


def test_documents_give_lo_and_length():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, -1, 5, 2, 2, 2], [3, 3, -1, 7, -1, -1]])
    layout = ThoughtLayout.from_documents(ids, thoughts=1, rows=2)
    assert layout.lo.tolist() == [[0, 0, 0, 3, 3, 3], [0, 1, 2, 3, 3, 3], [0, 0, 2, 3, 3, 3]]
    assert torch.equal(layout.length[..., 0], 2 * (ids >= 0))


def test_every_position_is_at_all_positions():
    every = ThoughtLayout.every_position(2, 5, 3, 4)
    at = ThoughtLayout.at(torch.arange(5).expand(2, 5), 3, 4, text_length=5)
    for name in ("anchor", "lo", "length"):
        assert torch.equal(getattr(every, name), getattr(at, name)) and getattr(at, name).dtype == torch.int32
    sizes = (every.B, every.L, every.P, every.N, every.S, every.R, every.M)
    assert sizes == (2, 5, 5, 3, 4, 60, 65)
    assert repr(every) == "ThoughtLayout(B=2 L=5 P=5 N=3 S=4 R=60 M=65, device=cpu)"


def test_select_text_only_and_to():
    layout = random_layout(torch.Generator().manual_seed(3), "ragged", max_text=9)
    places = slice(1, 3)
    some = layout.select(places)
    want = ThoughtLayout.at(layout.anchor[:, places], layout.N, layout.S, lo=layout.lo, length=layout.length[:, places])
    assert torch.equal(some.dense_mask(), want.dense_mask()) and some.P == 2
    text = layout.text_only()
    assert (text.P, text.R, text.M) == (0, 0, layout.L)
    assert torch.equal(text.dense_mask(), layout.dense_mask()[:, : layout.L, : layout.L])
    assert torch.equal(text.position_ids(), layout.text_position_ids())
    moved = layout.to("meta", non_blocking=True)
    assert moved.device.type == "meta" and moved.anchor.is_meta and moved.length.is_meta
    assert moved.position_ids().shape == (layout.B, layout.M)
    assert torch.equal(layout.to("cpu").dense_mask(), layout.dense_mask())


AT = {"anchors": torch.tensor([[0, 2], [1, -1]]), "thoughts": 2, "rows": 3, "text_length": 4}
LO = torch.zeros(2, 4, dtype=torch.int32)
LENGTH = torch.full((2, 2, 2), 3)
MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])
IDS = {"input_ids": torch.zeros(2, 4).long(), "thought_ids": torch.zeros(2, 2, 2, 1).long()}
PACKED = "packed must be a dense tensor of shape [B,M,...]=[2,16,...], got "


def at(**change):
    return ThoughtLayout.at(**(AT | change))


def token_ids(**change):
    return at().token_ids(**(IDS | change), start_id=1, end_id=2, pad_id=0)


def sequences(*given):
    return ThoughtLayout.from_sequences(*given)


REFUSED = [  # a call, and what its error begins with
    (lambda: at(thoughts=0), ": thoughts N must be an integer of at least 1, got 0"),
    (lambda: at(rows=0), ": rows S must be an integer of at least 1, got 0"),
    (lambda: at(anchors=torch.zeros(2, 2)), ": anchors must have dtype int32, int64, got float32"),
    (lambda: at(anchors=[[0]]), ": anchors must be a tensor [B,P], got [[0]]"),
    (lambda: at(text_length=None), ": at() needs lo or text_length"),
    (lambda: at(lo=LO[:, :3]), ": lo must have shape [B,L]=[2,4], got [2,3]"),
    (lambda: at(lo=LO.to("meta")), ": lo must be on cpu, got meta"),
    (lambda: at(length=LENGTH[:, :1]), ": length must have shape [B,P,N]=[2,2,2], got [2,1,2]"),
    (
        lambda: at(anchors=torch.tensor([[0, 2], [1, 4]])),
        ": anchors must be from -1 to L-1=3, broken at [1, 1]",
    ),
    (lambda: at(anchors=torch.tensor([[0, 2], [2, 1]])), ": anchors must ascend, with -1 only at the end, broken at [1, 0]"),
    (lambda: at(lo=LO + torch.tensor([0, 0, 3, 0])), ": lo must satisfy 0 <= lo[b,t] <= t, broken at [0, 2] of shape [2, 4]"),
    (lambda: at(length=LENGTH + 1), ": length must be from 0 to rows S=3, broken at [0, 0, 0] of shape [2, 2, 2]"),
    (lambda: ThoughtLayout.every_position(-1, 2, 1, 1), ": batch must be an integer of at least 0, got -1"),
    (lambda: ThoughtLayout.from_padding(MASK.float(), 1, 1), ": attention_mask must have dtype"),
    (
        lambda: ThoughtLayout.from_padding(torch.tensor([[1, 1, 1], [1, 0, 1]]), 1, 1),
        ": attention_mask must have its ones together, row 1 has padding inside the text",
    ),
    (lambda: ThoughtLayout.from_padding(MASK, 1, 1, MASK[:1]), ": anchors must have shape [B,P]=[2,?], got [1,3]"),
    (lambda: ThoughtLayout.from_documents(MASK[0], 1, 1), ": document_ids must have shape [B,L]=[?,?], got [3]"),
    (
        lambda: ThoughtLayout.from_documents(torch.tensor([[0, 0, 0], [4, 5, 4]]), 1, 1),
        ": document_ids must keep a document together, row 1 has one in two pieces",
    ),
    (
        lambda: ThoughtLayout.packed(torch.tensor([[1, 1]]), torch.tensor([[2**62, 2**62]]), 3),  # beyond 64 bits in all
        ": L+R and B*C must be at most 2,147,483,647",
    ),
    (lambda: token_ids(input_ids=LO[:, :3]), ".token_ids: input_ids must have shape [B,L]=[2,4], got [2,3]"),
    (lambda: token_ids(thought_ids=LENGTH[:, :, :1, None]), ".token_ids: thought_ids must have shape [B,P,N,T]=[2,2,2,?]"),
    (lambda: token_ids(thought_ids=torch.zeros(2, 2, 2, 2).long()), ".token_ids: rows S must be at least T+2=4, got 3"),
    (lambda: at().split(torch.zeros(2, 15, 3)), f".split: {PACKED}a tensor [2, 15, 3] of float32"),
    (lambda: at().split(None), f".split: {PACKED}None"),
    (lambda: at().predicting(torch.zeros(3, 16), 1), f".predicting: {PACKED}a tensor [3, 16] of float32"),
    (lambda: at().predicting(torch.zeros(2, 16), 0), ".predicting: lookahead must be from 1 to S=3, got 0"),
    (lambda: at().targets(LO, 4), ".targets: lookahead must be from 1 to S=3, got 4"),
    (lambda: sequences(5), ".from_sequences: sequences must be a list of lists or tensors of token ids, got 5"),
    (lambda: sequences([None]), ".from_sequences: sequence 0 must be integers [T] of 64 bits, got None"),
    (lambda: sequences(["abc"]), ".from_sequences: sequence 0 must be integers [T] of 64 bits, got 'abc'"),
    (lambda: sequences([[2**63]]), ".from_sequences: sequence 0 must be integers [T] of 64 bits, got [9223372036854775808]"),
    (lambda: sequences([[-(2**63)]]), ".from_sequences: ids must be above -2^63"),
    (lambda: sequences([[1, 2], [1, 0.5]]), ".from_sequences: sequence 1 must be integers [T], got torch.float32 [2]"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refused(call, message):
    token_ids()
    with pytest.raises(ValueError, match="^ThoughtLayout" + re.escape(message)):
        call()


def test_values_are_checked_in_a_compiled_function_too():
    def build(anchors):
        return at(anchors=anchors).anchor

    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(AT["anchors"]), build(AT["anchors"]))
    with pytest.raises(RuntimeError, match="anchors must be from -1 to L-1=3"):
        compiled(AT["anchors"] + 10)


def test_thoughts_without_text():
    """All of them are off."""
    layout = ThoughtLayout.at(torch.full((2, 3), -1), 2, 4, text_length=0)
    assert layout.position_ids().tolist() == [[0] * 24] * 2
    assert not layout.dense_mask().any() and layout.dense_mask(2).shape == (2, 24, 24)
    empty, thoughts = torch.zeros(2, 0, dtype=torch.int64), torch.ones(2, 3, 2, 2, dtype=torch.int64)
    assert layout.token_ids(empty, thoughts, 5, 6, 7).tolist() == [[7] * 24] * 2
    assert layout.predicting(torch.ones(2, 24, 5), 2).shape == (2, 3, 2, 2, 5)
    assert torch.equal(layout.targets(empty, 2), torch.full((2, 3, 2, 2), -100))
    for backend in ("reference", "cpu"):
        out = thought_attention(*torch.ones(3, 2, 4, 24, 8), layout, backend=backend)
        assert out.shape == (2, 4, 24, 8) and not out.any()


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def compiled_in_inference_mode(function, *inputs):
    torch.compiler.reset()
    with torch.inference_mode():
        torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)


def in_fake_tensor_mode(function, *inputs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        function(*map(mode.from_tensor, inputs))


WORLDS = {
    "inference mode": torch.inference_mode()(lambda function, *inputs: function(*inputs)),
    "compiled in inference mode": compiled_in_inference_mode,
    "export": lambda function, *inputs: torch.export.export(Called(function), inputs),
    "fake tensors": in_fake_tensor_mode,
    "make_fx, real": lambda function, *inputs: make_fx(function)(*inputs),
    "make_fx, fake": lambda function, *inputs: make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs),
    "torch.func": lambda function, *inputs: torch.func.vjp(function, *inputs),
}


def out_and_gradients(layout, inputs, backend):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = thought_attention(*leaves, layout, backend=backend)
    out.square().sum().backward()
    return [out, *(x.grad for x in leaves)]


@pytest.mark.parametrize("first_used_in", WORLDS)
def test_a_layout_trains_wherever_it_was_made_and_first_used(first_used_in):
    for seed, (kind, backend) in enumerate([("ragged", "cpu"), ("packed", "reference")]):
        fresh = random_layout(torch.Generator().manual_seed(seed), kind, max_text=9)
        *inputs, _ = attention_inputs(torch.Generator().manual_seed(9), fresh, 2, 1, 8, 4).values()
        want = out_and_gradients(fresh, inputs, backend)
        for made_in_inference_mode in (False, True):
            with torch.inference_mode(made_in_inference_mode):
                layout = random_layout(torch.Generator().manual_seed(seed), kind, max_text=9)
            WORLDS[first_used_in](lambda *x: thought_attention(*x, layout, backend=backend), *inputs)  # noqa: B023
            got = out_and_gradients(layout, inputs, backend)
            assert all(type(x) is torch.Tensor and torch.equal(x, y) for x, y in zip(got, want, strict=True)), kind


def same_fields(layout, other):
    pairs = ((getattr(layout, f.name), getattr(other, f.name)) for f in dataclasses.fields(layout)[:-1])
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


REBUILT = {
    "FSDP, same tensors": lambda layout: _apply_to_tensors(lambda x: x, layout),
    "FSDP, moved": lambda layout: _apply_to_tensors(torch.clone, layout),
    "FSDP, in a dict": lambda layout: _apply_to_tensors(torch.clone, {"thought_layout": layout})["thought_layout"],
    "replace": dataclasses.replace,
    "deepcopy": copy.deepcopy,
    "pickle": lambda layout: pickle.loads(pickle.dumps(layout)),
    "tree_map": lambda layout: tree_map(lambda x: x, [layout])[0],
    "to": lambda layout: layout.to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("rebuild", REBUILT.values(), ids=REBUILT)
def test_frameworks_may_rebuild_a_layout(rebuild, kind):
    layout = random_layout(torch.Generator().manual_seed(3), kind)
    for _ in range(2):  # before and after its branches are made
        rebuilt = rebuild(layout)
        assert same_fields(layout, rebuilt) and torch.equal(rebuilt.dense_mask(), layout.dense_mask())
    same_tensors = all(getattr(rebuilt, name) is getattr(layout, name) for name in ("anchor", "lo", "length"))
    assert (rebuilt.branches is layout.branches) == same_tensors


def test_a_changed_field_makes_new_branches():
    layout = ThoughtLayout.every_position(2, 5, 2, 3)
    changes = {"length": layout.length - 1, "anchor": layout.anchor.clone().fill_(-1), "lo": layout.lo + 0, "own": "full"}
    for name, value in changes.items():
        layout.dense_mask()
        got = dataclasses.replace(layout, **{name: value})
        want = ThoughtLayout(**{f.name: getattr(got, f.name) for f in dataclasses.fields(got)[:-1]})
        assert torch.equal(got.dense_mask(), want.dense_mask()), name


def constructors():
    """Each public constructor, as a function of its tensors, and these in int32."""
    zeros, anchors, lengths = torch.zeros(2, 6), torch.tensor([[1, 3, 4], [0, 2, 2]]), torch.tensor([[1, 2, 3], [0, 2, 1]])
    parents, grid = torch.tensor([[-1, 0, -1], [-1, -1, 1]]), {"thoughts": 1, "rows": 3}
    calls = {
        "at": (lambda a, lo, n: ThoughtLayout.at(a, lo=lo, length=n[..., None], **grid), anchors, zeros, lengths),
        "packed": (lambda a, lo, n: ThoughtLayout.packed(a, n, lo=lo, rows=6), anchors, zeros, lengths),
        "tree": (lambda a, lo, n, p: ThoughtLayout.tree(a, p, n, lo=lo, rows=6), anchors, zeros, lengths, parents),
        "from_padding": (lambda mask, a: ThoughtLayout.from_padding(mask, anchors=a, **grid), zeros + 1, anchors),
        "from_documents": (lambda ids, a: ThoughtLayout.from_documents(ids, anchors=a, **grid), zeros, anchors),
        "from_sequences": (lambda ids: ThoughtLayout.from_sequences(list(ids))[0], lengths),
    }
    return {name: (function, [x.int() for x in tensors]) for name, (function, *tensors) in calls.items()}


@pytest.mark.parametrize("function, tensors", constructors().values(), ids=constructors())
def test_a_layout_keeps_no_tensor_of_the_caller(function, tensors):
    layout, want = function(*tensors), function(*(x.clone() for x in tensors))
    for x in tensors:
        x.fill_(10**6)
    assert same_fields(layout, want) and torch.equal(layout.dense_mask(), want.dense_mask())


@pytest.mark.parametrize("world", ["fake tensors", "make_fx, real"])
@pytest.mark.parametrize("name", constructors())
def test_layouts_without_values(name, world):
    """Shapes alone, as in an estimate of memory; ``from_sequences`` computes from values, and says so."""
    function, tensors = constructors()[name]
    shape = None if name == "from_sequences" else function(*tensors).dense_mask().shape

    def used(*tensors):
        layout = function(*tensors)
        assert layout.dense_mask().shape == shape
        q = torch.ones(2, 2, layout.M, 8, requires_grad=True)
        out = thought_attention(q, q, q, layout)
        out.sum().backward()
        return out.detach()

    def run():
        if world == "fake tensors":
            with FakeTensorMode() as mode:
                return used(*map(mode.from_tensor, tensors))
        return make_fx(used, tracing_mode=world.split()[1])(*tensors)

    if shape is None:
        with pytest.raises(ValueError, match="from_sequences: sequence 0 must have values"):
            run()
    else:
        run()


def test_sequences_under_another_default_device():
    want = ThoughtLayout.from_sequences([[1, 2, 3], [1, 2, 4]])
    with torch.device("meta"):
        got = ThoughtLayout.from_sequences([[1, 2, 3], [1, 2, 4]], device="cpu")
    assert same_fields(got[0], want[0]) and torch.equal(got[1], want[1])
