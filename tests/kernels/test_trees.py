"""Branches on branches: which rows see which, the error rule over random trees, leaks, decoding, and trees that are refused."""

import random
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quietstar_kernels import ThoughtLayout, thought_attention, thought_decode
from quietstar_kernels.testing import assert_op_close_as_plain, attention_inputs, attention_magnitudes, plain_attention
from tests.kernels.drawn import normal, seeded

OP = "thought_attention"  # whose back ends run these tests


def nodes(draw, batch, places, most, text, deep=12):
    """Anchors, parents and lengths of random trees, as lists."""
    found = []
    for _ in range(batch):
        anchors, parents, lengths, path, anchor = [-1] * places, [-1] * places, [0] * places, [], 0
        for c in range(draw.randint(0, places)):
            del path[draw.randint(max(0, len(path) - draw.choice([1, 3, deep])), min(len(path), deep - 1)) :]
            if not path:
                anchor = draw.randint(anchor, text - 1)
            anchors[c], parents[c] = (draw.randint(-9, 99), path[-1]) if path else (anchor, -1)
            lengths[c] = draw.choice([0, 1, most, draw.randint(0, most)])
            path.append(c)
        found.append((anchors, parents, lengths))
    return zip(*found, strict=True)


def random_tree(draw, device="cpu", own=None, text=None):
    text = text or draw.choice([1, 6, 40])
    batch, places, most = draw.choice([1, 2]), draw.choice([1, 9, 30]), draw.choice([1, 5, 50])
    anchors, parents, lengths = map(torch.tensor, nodes(draw, batch, places, most, text))
    cut = draw.randrange(text)
    lo = torch.where(torch.arange(text) < cut, 0, cut).expand(batch, text)  # two documents
    layout = ThoughtLayout.tree(anchors, parents, lengths, lo=lo, own=own or draw.choice(["causal", "causal", "full"]))
    return layout.to(device)


def paths(layout, b):
    """Of each node: the rows of the nodes above it, its own rows, whether it is a leaf, and its root's anchor."""
    parents = [-1] * layout.P if layout.parent is None else layout.parent[b].tolist()
    lengths = layout.length[b, :, 0].tolist()
    first, found = layout.L, []
    for c, parent in enumerate(parents):
        above, rows, _, anchor = found[parent] if parent >= 0 else ([], [], None, int(layout.anchor[b, c]))
        own = list(range(first, first + lengths[c]))
        found.append((above + rows, own, c not in parents, anchor))
        first += lengths[c]
    return found


def test_a_row_sees_its_path():
    for seed in range(80):
        draw = random.Random(seed)
        layout = random_tree(draw, text=6)
        if seed % 4 == 0:  # the same branches, none of which hangs on another
            layout = ThoughtLayout.packed(layout.anchor, layout.length[..., 0], lo=layout.lo, own=layout.own)
        window, lo = draw.choice([None, 1, 4]), layout.lo
        seen, position = torch.zeros(layout.B, layout.M, layout.M, dtype=torch.bool), torch.zeros(layout.B, layout.M).long()
        for b in range(layout.B):
            for t in range(6):
                seen[b, t, lo[b, t] : t + 1], position[b, t] = True, t - lo[b, t]
            for above, own, leaf, anchor in paths(layout, b):
                for i, row in enumerate(own):
                    seen[b, row, :6], seen[b, row, above] = seen[b, anchor, :6], True
                    seen[b, row, own if leaf and layout.own == "full" else own[: i + 1]] = True
                    position[b, row] = position[b, anchor] + 1 + len(above) + i
        if window is not None:
            seen &= position[:, None] > position[..., None] - window
        assert torch.equal(layout.dense_mask(window), seen), seed
        assert torch.equal(layout.position_ids(), position), seed
        assert layout.S == max(1, *(len(above) + len(own) for b in range(layout.B) for above, own, _, _ in paths(layout, b)), 0)


@pytest.mark.parametrize("part", range(8))  # which a GPU's tests share among processes, since each seed compiles
def test_error_rule_on_trees(backend, device, few, interpreted, part):
    for seed in few(range(part, 60, 8), 1):
        draw, generator = random.Random(seed), seeded(seed)
        layout = random_tree(draw, device)
        heads, (K, E) = draw.choice([(1, 1), (4, 2), (3, 1)]), draw.choice([(8, 8), (16, 16), (32, 16), (5, 3)])
        options = {"window": draw.choice([None, None, 1, 4, 30]), "softcap": draw.choice([None, None, 2.0])}
        options |= {"query_rows": draw.choice(["all", "all", "thoughts"])}
        dtype = torch.float32 if interpreted else draw.choice([torch.float32, torch.float32, torch.bfloat16])
        inputs = attention_inputs(generator, layout, *heads, K, E, draw.random() < 0.3, options["query_rows"], dtype=dtype)
        grad_out = normal(generator, *inputs["q"].shape[:3], E, dtype=dtype, device=device)
        op = partial(thought_attention, return_lse=True, backend=backend)
        rest = {"magnitudes": attention_magnitudes(inputs, grad_out), "layout": layout} | options
        assert_op_close_as_plain(op, plain_attention, inputs, (grad_out,), f"seed {seed} {layout} {options}", **rest)


def test_equals_one_call_of_sdpa_for_each_path(backend, device, few):
    for seed in few(range(20), 4):
        layout = random_tree(random.Random(seed), device, own="causal")
        q, k, v = normal(seeded(seed), 3, layout.B, 2, layout.M, 16, device=device)
        out = thought_attention(q, k, v, layout, backend=backend)
        for b in range(layout.B):
            for above, own, _, anchor in paths(layout, b):
                if own:
                    text = list(range(int(layout.lo[b, anchor]), anchor + 1))
                    row = torch.tensor(text + above + own, device=device)
                    want = scaled_dot_product_attention(*(x[b : b + 1, :, row] for x in (q, k, v)), is_causal=True)
                    torch.testing.assert_close(out[b : b + 1, :, own], want[:, :, -len(own) :], atol=1e-5, rtol=1e-5)


def test_nan_in_a_node(backend, device, few):
    """It reaches the rows that see one of the node's, and no other."""
    changed = 0
    for seed in few(range(40), 4):
        draw = random.Random(seed)
        layout = random_tree(draw, device)
        window = draw.choice([None, 3])
        some = [own for _, own, _, _ in paths(layout, 0) if own]
        if not some:
            continue
        bad = draw.choice(some)
        q, k, v = normal(seeded(seed), 3, layout.B, 2, layout.M, 16, device=device)
        out = thought_attention(q, k, v, layout, window=window, backend=backend)
        v[0, :, bad] = torch.nan
        after = thought_attention(q, k, v, layout, window=window, backend=backend)
        sees = layout.dense_mask(window)[:, :, bad].any(-1)
        sees[1:] = False
        on = (out.transpose(1, 2)[sees], after.transpose(1, 2)[sees])
        assert on[1].isnan().all() and torch.equal(out.transpose(1, 2)[~sees], after.transpose(1, 2)[~sees]), seed
        changed += int((~sees[0]).sum())
    assert changed


def test_a_step_is_the_row_of_attention(backend, device, few):
    """Rows of nodes above are all there; NaN stands where nothing is written yet."""
    for seed in few(range(30), 2):
        draw, generator = random.Random(seed), seeded(seed)
        layout = random_tree(draw, device, own="causal")
        B, C, L, H, G = *layout.anchor.shape, layout.L, 4, 2
        options = {"window": draw.choice([None, None, 1, 4, 30]), "softcap": draw.choice([None, 2.0])}
        q, k, v = (normal(generator, B, heads, layout.M, 16, device=device) for heads in (H, G, G))
        truth = thought_attention(q, k, v, layout, backend="reference", **options)
        S = int(layout.length.max()) + 1  # more than any node has
        step = draw.randrange(max(1, S - 1))
        k_own, v_own = torch.full((2, B, G, C, S, 16), torch.nan, device=device)
        new, want = torch.zeros(2, B, H, C, 16, device=device)
        for b in range(B):
            for c, (_, own, leaf, _) in enumerate(paths(layout, b)):
                there = own[: step + 1] if leaf else own
                k_own[b, :, c, : len(there)], v_own[b, :, c, : len(there)] = k[b, :, there], v[b, :, there]
                if step < len(own):
                    new[b, :, c], want[b, :, c] = q[b, :, own[step]], truth[b, :, own[step]]
        got = thought_decode(new, k[:, :, :L], v[:, :, :L], k_own, v_own, layout, step, backend=backend, **options)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, seed=seed: f"seed {seed}: {m}")


def test_a_window_longer_than_text_and_nodes(backend, device):
    """It still cuts what is far back on a path."""
    layout = ThoughtLayout.tree(torch.tensor([[0, -1, -1]]), torch.tensor([[-1, 0, 1]]), torch.tensor([[4, 4, 4]]), 1).to(
        device
    )
    q, k, v = normal(seeded(0), 3, 1, 2, 13, 16, device=device)
    want = thought_attention(q, k, v, layout, window=6, backend="reference")[:, :, 4::4]
    text, own = ((x[:, :, :1] for x in (k, v)), (x[:, :, 1:].unflatten(2, (3, 4)) for x in (k, v)))
    got = thought_decode(q[:, :, 4::4], *text, *own, layout, 3, window=6, backend=backend)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_without_parents_it_is_packed(backend, device):
    anchors, lengths = torch.tensor([[0, 2, 2, -1]]), torch.tensor([[3, 0, 4, 0]])
    tree = ThoughtLayout.tree(anchors, torch.full_like(anchors, -1), lengths, text_length=4, own="full")
    packed = ThoughtLayout.packed(anchors, lengths, text_length=4, own="full")
    results = []
    for layout in (tree, packed):
        q, k, v = (x.requires_grad_() for x in normal(seeded(0), 3, 1, 2, layout.M, 16, device=device))
        out = thought_attention(q, k, v, layout.to(device), backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "parents, says",
    [
        ([-1, 2, -1, -1], r"parents must be -1 or come before their children, broken at \[0, 1\]"),
        ([-1, 1, -1, -1], r"parents must be -1 or come before their children, broken at \[0, 1\]"),
        ([-1, -2, -1, -1], r"parents must be -1 or come before their children, broken at \[0, 1\]"),
        ([-1, 0, 0, 1], r"parents must make depth-first order.*, broken at \[0, 1\]"),
        ([-1, -1, 0, -1], r"parents must make depth-first order.*, broken at \[0, 0\]"),
    ],
)
def test_bad_trees(parents, says):
    with pytest.raises(ValueError, match=says):
        ThoughtLayout.tree(torch.tensor([[0, 1, 2, 3]]), torch.tensor([parents]), torch.ones(1, 4, dtype=torch.int32), 4)


def test_roots_are_checked_as_branches_are():
    parents = torch.tensor([[-1, 0, -1]])
    tree = partial(ThoughtLayout.tree, parents=parents, text_length=4)
    with pytest.raises(ValueError, match=r"anchors must ascend, .* broken at \[0, 1\]"):
        tree(torch.tensor([[2, 9, 1]]), lengths=torch.tensor([[1, 1, 1]]))
    with pytest.raises(ValueError, match="the sum of lengths must be at most rows R=2"):
        tree(torch.tensor([[1, 9, 2]]), lengths=torch.tensor([[1, 1, 1]]), rows=2)


def test_a_parent_must_be_stored_whole():
    layout = ThoughtLayout.tree(torch.tensor([[0, -1]]), torch.tensor([[-1, 0]]), torch.tensor([[3, 5]]), 1)
    q, text, own = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 3, 8)
    thought_decode(q, text, text, own, own, layout, 0)  # rows of a leaf may be missing
    with pytest.raises(ValueError, match="thought_decode: k_own must hold all rows of a node with children, got S=2"):
        thought_decode(q, text, text, own[:, :, :, :2], own[:, :, :, :2], layout, 0)


def test_sequences_become_a_tree():
    """Every token that two sequences begin with has one row, and each sequence is a path."""
    for seed in range(60):
        draw = random.Random(seed)
        sequences = [[draw.randint(0, 2) for _ in range(draw.choice([0, 1, 3, 9]))] for _ in range(draw.randint(0, 12))]
        given = [torch.tensor(x, dtype=torch.int32) if draw.random() < 0.3 else x for x in sequences]
        layout, ids, rows = ThoughtLayout.from_sequences(given)
        assert ids.shape == (1, layout.M) and layout.M == len({tuple(x[:n]) for x in sequences for n in range(1, len(x) + 1)})
        seen = layout.dense_mask()[0]
        for tokens, row in zip(sequences, rows, strict=True):
            assert ids[0, row].tolist() == tokens and layout.position_ids()[0, row].tolist() == list(range(len(tokens)))
            for i, r in enumerate(row.tolist()):
                assert seen[r].nonzero()[:, 0].tolist() == sorted(row[: i + 1].tolist())


def chain(nodes):
    parents = torch.arange(-1, nodes - 1)[None]
    return torch.where(parents < 0, 1, -1), parents, torch.full((1, nodes), 2)


@pytest.mark.parametrize("inside", [False, True])
def test_two_graphs_serve_any_number_of_nodes(inside):
    def attend(q, *made):
        layout = ThoughtLayout.tree(*made, text_length=3, rows=q.shape[2] - 3) if inside else made[0]
        return thought_attention(q, q, q, layout)

    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(attend, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for nodes in (2, 3, 4, 9, 17):
        q, tree = torch.randn(1, 2, 3 + 2 * nodes, 8), chain(nodes)
        made = tree if inside else [ThoughtLayout.tree(*tree, text_length=3)]
        torch.testing.assert_close(compiled(q, *made), attend(q, *made))
    assert len(graphs) == 2
