"""thought_attention: error rule over random layouts, gradcheck, opcheck, compile, rows that are off, edge sizes."""

from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, thought_attention
from quietstar_kernels.testing import (
    BRANCH_KINDS,
    LAYOUT_KINDS,
    assert_op_close_as_plain,
    attention_inputs,
    attention_magnitudes,
    forward_backward,
    plain_attention,
    random_layout,
)
from quietstar_kernels.thought_attention import _backward, _forward
from tests.kernels.drawn import normal, pick, seeded, spread

KINDS = LAYOUT_KINDS + BRANCH_KINDS
CASES = 650  # random layouts, all kinds together
DTYPES = [torch.float32] * 6 + [torch.float16, torch.bfloat16]
WIDTHS = [(8, 8), (16, 16), (3, 5), (17, 1), (1, 16)]


@pytest.fixture
def case(device, interpreted, compiled):
    """``random_case`` on the device of the test, in the dtypes that the back end computes."""
    if compiled:
        return partial(
            random_case, device=device, dtypes=[torch.float32, torch.bfloat16], widths=[(64, 64), (128, 128)], alike=True
        )
    return partial(random_case, device=device, dtypes=DTYPES[:-1] if interpreted else DTYPES, widths=WIDTHS)


def check(backend, layout, inputs, grad_out, what, **options):
    op = partial(thought_attention, return_lse=True, backend=backend)
    magnitudes = attention_magnitudes(inputs, grad_out, options.get("scale"))
    grads = grad_out, normal(seeded(0), *grad_out.shape[:3], device=grad_out.device)
    assert_op_close_as_plain(op, plain_attention, inputs, grads, what, magnitudes=magnitudes, layout=layout, **options)


def merged(attention, q, k, v, other_k, other_v, sinks, **options):
    """Attention over two sets of keys, each in a call, and a z-loss; NaN reaches the gradients of rows that are off."""
    out, lse = attention(q, k, v, **options)
    other, other_lse = attention(q, other_k, other_v, sinks=sinks, **options)
    both = torch.logaddexp(lse, other_lse)
    on = both.isfinite()
    out = out * (lse - both).exp()[..., None] + other * (other_lse - both).exp()[..., None]
    return torch.where(on[..., None], out, 0), torch.where(on, both.square(), 0)


def test_gradients_of_the_log_sum_exp(backend, device, case, few):
    for seed in few(range(40, 48), 1):
        layout, inputs, grad_out, options = case(seed)
        inputs |= {"other_k": inputs["k"].flip(2), "other_v": inputs["v"].flip(2)}
        inputs = {name: None if x is None else x.float() for name, x in inputs.items()}
        grads = grad_out.float(), normal(seeded(seed), *grad_out.shape[:3], device=device)
        magnitudes = dict.fromkeys(inputs, 30.0)
        op = partial(thought_attention, return_lse=True, backend=backend)
        pair = partial(merged, op), partial(merged, plain_attention)
        assert_op_close_as_plain(*pair, inputs, grads, f"seed {seed}", magnitudes, layout=layout, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_gradient_of_the_log_sum_exp_alone(device, backend, dtype):
    layout = ThoughtLayout.from_padding(torch.tensor([[0, 1, 1], [1, 1, 1]], device=device), 1, 2)
    inputs = attention_inputs(seeded(0), layout, sinks=True, dtype=dtype)
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no fp64")
    lse = lambda attention, **inputs: attention(**inputs, layout=layout)[1]  # noqa: E731
    pair = partial(lse, partial(thought_attention, return_lse=True, backend=backend)), partial(lse, plain_attention)
    assert_op_close_as_plain(*pair, inputs, (normal(seeded(1), *inputs["q"].shape[:3], device=device),))


def random_case(seed, device, dtypes, widths, alike=False, **sizes):
    """Layout, inputs, gradient of the output and options, all drawn from one seed; ``alike``: all options or none."""
    generator = seeded(seed)
    layout = random_layout(generator, KINDS[seed % len(KINDS)], device=device, **sizes)
    options = {
        "scale": pick(generator, [None, None, 0.3]),
        "window": pick(generator, [None, None, 1, 3, 6]),
        "softcap": pick(generator, [None, None, 5.0, 1.0]),
        "query_rows": pick(generator, ["all", "all", "thoughts"]),
    }
    heads, groups = pick(generator, [(1, 1), (2, 1), (4, 2), (3, 3)])
    widths, dtype = pick(generator, widths), pick(generator, dtypes)
    sinks, strided = pick(generator, [True, False]), pick(generator, [True, False])
    if alike:
        strided = False
        options |= {"window": 3, "softcap": 5.0} if sinks else {"window": None, "softcap": None}
    inputs = attention_inputs(generator, layout, heads, groups, *widths, sinks, options["query_rows"], strided, dtype)
    grad_out = normal(generator, *inputs["q"].shape[:3], widths[1], dtype=dtype, device=device)
    return layout, inputs, grad_out, options


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_error_rule_on_random_layouts(backend, kind, part, case, few):
    for seed in few(range(kind + part * len(KINDS), CASES, 3 * len(KINDS)), 1):
        layout, inputs, grad_out, options = case(seed)
        check(backend, layout, inputs, grad_out, f"seed {seed} {layout} {options}", **options)


@pytest.mark.parametrize("part", range(3))
def test_error_rule_on_longer_texts(backend, part, case, few, interpreted):
    """Texts of up to 150 positions, so that rows and keys fill several tiles or chunks; the interpreter's tiles are small."""
    sizes = {"max_batch": 2, "max_text": 60 if interpreted else 150, "max_thoughts": 2, "max_rows": 4}
    for seed in few(range(1000 + part, 1012, 3), 1):
        layout, inputs, grad_out, options = case(seed, **sizes)
        check(backend, layout, inputs, grad_out, f"seed {seed} {layout} {options}", **options)


@pytest.mark.parametrize("width", [1, 2, 100, 128, 256])
def test_error_rule_at_other_widths(backend, width, device, interpreted):
    generator = seeded(width)
    layout = random_layout(generator, "anchors", max_text=15 if interpreted else 40, device=device)
    inputs = attention_inputs(generator, layout, width=width, value_width=257 - width)
    check(backend, layout, inputs, normal(generator, layout.B, 4, layout.M, 257 - width, device=device), f"{layout}")


@pytest.mark.parametrize("group, window", [(3, None), (7, 19), (8, 4)])
def test_error_rule_at_other_head_groups(backend, group, window, device):
    """H/G query heads share a key head; with thoughts of 20 rows, more than a block of own keys."""
    generator = seeded(group)
    anchors, length = torch.tensor([[0, 2, 4]]), torch.tensor([[[20], [7], [17]]])
    layout = ThoughtLayout.at(anchors, 1, 20, text_length=5, length=length).to(device)
    inputs = attention_inputs(generator, layout, group, 1, sinks=True)
    grad_out = normal(generator, *inputs["q"].shape, device=device)
    check(backend, layout, inputs, grad_out, f"{layout}", window=window)


def test_sinks_of_another_dtype(backend, device, interpreted):
    dtype = torch.float16 if interpreted else torch.bfloat16
    generator = seeded(0)
    layout = random_layout(generator, "ragged", device=device)
    inputs = attention_inputs(generator, layout, dtype=dtype)
    inputs["sinks"] = normal(generator, 4, device=device)
    check(backend, layout, inputs, normal(generator, layout.B, 4, layout.M, 8, dtype=dtype, device=device), f"{layout}")


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_that_are_far_from_each_other(backend, device, interpreted, dim):
    """By more than 32 bits; batch rows of a grid, heads and rows of a tree."""
    dtype = torch.float16 if interpreted else torch.bfloat16
    tree = ThoughtLayout.tree(*torch.tensor([[[0, -1]] * 2, [[-1, 0]] * 2, [[2, 3]] * 2]), text_length=3)
    layout = (tree if dim else ThoughtLayout.every_position(2, 3, 1, 2)).to(device)
    q, k, v, _ = attention_inputs(seeded(0), layout, 2, 2, dtype=dtype).values()
    tensors = [q, k, v, normal(seeded(1), *q.shape, dtype=dtype, device=device)]
    want, got = (results(*x, layout, backend) for x in (tensors, [spread(x, dim) for x in tensors]))
    assert all(map(torch.equal, got, want))


def results(q, k, v, grad_out, layout, backend):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = thought_attention(*leaves, layout=layout, backend=backend)
    return out, *torch.autograd.grad(out, leaves, grad_out)


SMALL = {
    "left padding": ThoughtLayout.from_padding(torch.tensor([[0, 1], [1, 1]]), 2, 2),
    "documents": ThoughtLayout.from_documents(torch.tensor([[0, 0, 1, 1]]), 1, 2, torch.tensor([[1, 3, -1]])),
    "ragged": ThoughtLayout.at(torch.tensor([[0, 2]]), 2, 2, text_length=3, length=torch.tensor([[[2, 1], [0, 2]]])),
    "full": ThoughtLayout.packed(torch.tensor([[0, 2, 2]]), torch.tensor([[2, 0, 3]]), 3, rows=6, own="full"),
}
GRADCHECKS = [
    ("documents", {}),
    ("full", {}),
    ("ragged", {"window": 2}),
    ("full", {"softcap": 1.5}),
    ("left padding", {"window": 3, "softcap": 2.0, "query_rows": "thoughts", "scale": 0.7}),
]


@pytest.mark.parametrize("name, options", GRADCHECKS, ids=str)
def test_gradcheck(backend, name, options, device):
    if backend == "triton":
        pytest.skip("it does not compute in fp64")
    rows, layout = options.get("query_rows", "all"), SMALL[name].to(device)
    inputs = attention_inputs(seeded(0), layout, 2, 1, 2, 1, True, rows, dtype=torch.float64)
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    op = lambda q, k, v, sinks: thought_attention(  # noqa: E731
        q, k, v, layout, sinks=sinks, backend=backend, **options
    )
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.kernels
def test_opcheck(backend, device):
    layout = SMALL["ragged"].to(device)
    q, k, v, sinks = attention_inputs(seeded(0), layout, 2, 1, sinks=True).values()
    metadata = (*layout.branches[:3], None, None)  # no tree
    rest = (layout.branches.full, 0.5, 2, 1.5, backend)
    out, lse = _forward(q, k, v, *metadata, sinks, *rest)
    for grad_lse in ((), (torch.ones_like(lse),)):
        torch.library.opcheck(_backward, (out, q, k, v, out, lse, *metadata, sinks, *rest, *grad_lse))
    leaves = [x.detach().requires_grad_() for x in (q, k, v, sinks)]
    torch.library.opcheck(_forward, (*leaves[:3], *metadata, leaves[3], *rest))


def test_compiles_without_a_graph_break(backend, device):
    layout = random_layout(seeded(1), "ragged", device=device)
    inputs = attention_inputs(seeded(2), layout, sinks=True, query_rows="thoughts")
    grad_out = normal(seeded(3), *inputs["q"].shape, device=device)

    def attention(q, k, v, sinks):
        options = {"window": 4, "softcap": 3.0, "sinks": sinks, "query_rows": "thoughts", "return_lse": True}
        out, lse = thought_attention(q, k, v, layout, backend=backend, **options)
        return 2 * out * lse.exp()[..., None]

    eager = forward_backward(attention, inputs, (grad_out,))
    compiled = forward_backward(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs, (grad_out,))
    assert torch.equal(eager[0][0], compiled[0][0])
    assert all(torch.equal(eager[1][name], compiled[1][name]) for name in inputs)


def run(backend, layout, inputs, grad_out, **options):
    return forward_backward(
        partial(thought_attention, return_lse=True, backend=backend), inputs, (grad_out,), layout=layout, **options
    )


@pytest.mark.parametrize("half", [0, 1])
def test_rows_that_are_off(backend, half, case, few):
    for seed in few(range(half, 20, 2), 2):
        layout, inputs, grad_out, options = case(seed)
        (out, lse), grads = run(backend, layout, inputs, grad_out, **options)
        text = torch.ones(layout.B, layout.L, dtype=torch.bool, device=layout.device)
        off = ~torch.cat([text, layout.live().flatten(1)], 1)
        rows_off = off[:, -out.shape[2] :] if out.shape[2] else off[:, :0]
        shown = lambda mask, x: x.transpose(1, 2)[mask]  # noqa: E731
        assert (shown(rows_off, out) == 0).all() and (shown(rows_off, lse) == -torch.inf).all()
        assert shown(~rows_off, lse).isfinite().all()
        assert (shown(rows_off, grads["q"]) == 0).all()
        assert (shown(off, grads["k"]) == 0).all() and (shown(off, grads["v"]) == 0).all()
        expected = torch.float32 if out.dtype != torch.float64 else torch.float64
        assert lse.dtype == expected


@pytest.mark.parametrize("half", [0, 1])
def test_two_runs_agree_bitwise(backend, half, case, few, interpreted):
    for seed in few(range(half, 20, 2), 1):
        layout, inputs, grad_out, options = case(seed, max_text=15 if interpreted else 60)
        (out, lse), grads = run(backend, layout, inputs, grad_out, **options)
        (again, lse_again), grads_again = run(backend, layout, inputs, grad_out, **options)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)
        assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_gradients_are_optional_and_may_come_expanded(backend, device):
    """One input at a time requires a gradient; the gradient of sum() has strides of 0."""
    layout = random_layout(seeded(4), "ragged", device=device)
    inputs = attention_inputs(seeded(5), layout, sinks=True)
    _, want = run(backend, layout, inputs, torch.ones_like(inputs["q"]))
    for name, x in inputs.items():
        leaf = x.detach().requires_grad_()
        thought_attention(**(inputs | {name: leaf}), layout=layout, backend=backend).sum().backward()
        assert torch.equal(leaf.grad, want[name]), name


EDGES = {
    "B=0": ThoughtLayout.every_position(0, 3, 2, 2),
    "L=0": ThoughtLayout.every_position(2, 0, 2, 2),
    "P=0": ThoughtLayout.every_position(2, 3, 2, 2).text_only(),
    "L=1": ThoughtLayout.every_position(2, 1, 2, 2),
    "one": ThoughtLayout.every_position(1, 1, 1, 1),
    "all off": ThoughtLayout.at(torch.full((2, 3), -1), 2, 2, text_length=4),
    "no branches": ThoughtLayout.packed(torch.zeros(2, 0).int(), torch.zeros(2, 0).int(), 3, rows=2),
    "empty branches": ThoughtLayout.packed(torch.tensor([[0, 2]]), torch.tensor([[0, 0]]), 3),
}


@pytest.mark.parametrize("query_rows", ["all", "thoughts"])
@pytest.mark.parametrize("name", EDGES)
def test_edges(backend, name, query_rows, device):
    layout = EDGES[name].to(device)
    for softcap in (None, 2.0):
        inputs = attention_inputs(seeded(0), layout, sinks=True, query_rows=query_rows)
        grad_out = normal(seeded(1), *inputs["q"].shape, device=device)
        check(backend, layout, inputs, grad_out, name, query_rows=query_rows, softcap=softcap)


def test_no_query_heads(backend, device):
    """Keys get gradients of 0, not what memory held: in tests new memory is NaN."""
    layout = ThoughtLayout.every_position(1, 3, 1, 2, device=device)
    inputs = attention_inputs(seeded(0), layout, 2, 2, sinks=True)
    inputs |= {"q": inputs["q"][:, :0], "sinks": inputs["sinks"][:0]}
    _, grads = run(backend, layout, inputs, inputs["q"])
    assert all((x == 0).all() for x in grads.values()) and grads["k"].numel()
