"""thought_conv and its decoding step, against a loop over the row before each row, in fp64."""

from random import Random

import pytest
import torch

from quietstar_kernels import ThoughtLayout, conv_tails, thought_conv, thought_conv_decode
from quietstar_kernels.testing import random_layout
from quietstar_kernels.testing.plain import plain_conv
from tests.kernels.drawn import normal, pick, seeded
from tests.kernels.test_trees import random_tree

KINDS = ("every", "anchors", "left", "right", "both", "documents", "ragged", "no_anchors", "one", "packed", "tree")
D = 3


def drawn_layout(seed):
    kind = KINDS[seed % len(KINDS)]
    return random_tree(Random(seed), own="causal", text=6) if kind == "tree" else random_layout(seeded(seed), kind)


def drawn_inputs(seed, layout, dtype=torch.float64):
    """x, weight and bias."""
    generator = seeded(seed)
    taps, bias = pick(generator, [1, 2, 3, 4, 4, 6]), pick(generator, [True, False])
    shapes = (layout.B, layout.M, D), (D, taps), (D,)
    x, weight, bias_values = (normal(generator, *shape, dtype=dtype).requires_grad_() for shape in shapes)
    return x, weight, bias_values if bias else None


def gradients(out, inputs, seed):
    grad = normal(seeded(seed), *out.shape, dtype=torch.float64).to(out.dtype)
    inputs = [x for x in inputs if x is not None]
    return torch.autograd.grad(out, inputs, grad, retain_graph=True, materialize_grads=True) if out.numel() else []


@pytest.mark.parametrize("group", range(11))
def test_random_layouts(group):
    for seed in range(group * 20, group * 20 + 20):
        layout = drawn_layout(seed)
        inputs = drawn_inputs(seed, layout)
        got, want = thought_conv(*inputs, layout), plain_conv(*inputs, layout)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for x, y in zip(gradients(got, inputs, seed), gradients(want, inputs, seed), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-11, msg=f"seed {seed} {layout}")


def test_blocks(monkeypatch):
    """Which rows are computed at a time changes no value, and sums over rows only in order."""
    layout = ThoughtLayout.every_position(2, 9, 2, 3)
    inputs = drawn_inputs(1, layout)
    want = plain_conv(*inputs, layout)
    monkeypatch.setitem(thought_conv.__globals__["_BLOCK"], "cpu", 7 * D)
    got = thought_conv(*inputs, layout)
    torch.testing.assert_close(got, want)
    for x, y in zip(gradients(got, inputs, 0), gradients(want, inputs, 0), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("seed", range(33))
def test_text_of_an_earlier_call(seed):
    layout = drawn_layout(seed)
    x, weight, bias = drawn_inputs(seed, layout)
    text, own = x.split([layout.L, layout.R], 1)
    got, want = thought_conv(own, weight, bias, layout, text), thought_conv(x, weight, bias, layout)[:, layout.L :]
    assert torch.equal(got, want)
    for a, b in zip(gradients(got, (x, weight, bias), 0), gradients(want, (x, weight, bias), 0), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(33))
def test_steps_equal_the_packed_pass(seed):
    layout = drawn_layout(seed)
    x, weight, bias = (None if y is None else y.detach() for y in drawn_inputs(seed, layout))
    want = thought_conv(x, weight, bias, layout)
    start, length = layout.branches.table[..., 1].long(), layout.branches.table[..., 2]
    S = max(int(length.max()) if length.numel() else 0, 1) if layout.packed_rows is not None else layout.S
    s = torch.arange(S)
    rows = (layout.L + start[..., None] + s).clamp(max=max(layout.M - 1, 0))  # [B,C,S]
    batch = torch.arange(layout.B)[:, None, None]
    own = x[batch, rows].masked_fill((s >= length[..., None])[..., None], torch.nan)
    tails = conv_tails(x if layout.parent is not None else x[:, : layout.L], layout, weight.shape[1])
    for step in range(S):
        got = thought_conv_decode(own[:, :, step], tails, weight, bias)
        on = step < length
        torch.testing.assert_close(got[on], want[batch, rows][:, :, step][on], rtol=0, atol=1e-12)


def test_gradcheck():
    layout = ThoughtLayout.tree(*torch.tensor([[[0, -1, 3]], [[-1, 0, -1]], [[1, 2, 3]]]), text_length=5)
    assert torch.autograd.gradcheck(lambda *inputs: thought_conv(*inputs, layout), drawn_inputs(3, layout))


@pytest.mark.parametrize("seed", range(22))
def test_nan_reaches_rows_after_it_alone(seed):
    layout, generator = drawn_layout(seed), seeded(seed)
    x, weight, bias = drawn_inputs(seed, layout)
    if not x.numel():
        return
    parent, W = layout.branches.parent_rows(), weight.shape[1]
    b, m = (int(torch.randint(size, (), generator=generator)) for size in (layout.B, layout.M))
    reached = torch.zeros(layout.B, layout.M, dtype=torch.bool)
    live = torch.cat([torch.ones_like(layout.lo, dtype=torch.bool), layout.branches.live()], 1)
    for other in range(layout.M):
        row = other
        for _ in range(W):
            reached[b, other] |= row == m and bool(live[b, other])
            row = int(parent[b, row]) if row >= 0 else -1
    bad = x.detach().clone()
    bad[b, m] = torch.nan
    bad.requires_grad_()
    got, want = thought_conv(bad, weight, bias, layout), thought_conv(x, weight, bias, layout)
    assert torch.equal(got.isnan().all(-1), reached)
    assert torch.equal(got[~reached], want[~reached])
    kept, also = (gradients(out[~reached][None], inputs, 0) for out, inputs in ((got, [bad]), (want, [x])))
    assert all(map(torch.equal, kept, also))
    if not live[b, m]:  # nor the weight's
        kept, also = (gradients(out, [weight], 0) for out in (got, want))
        assert all(map(torch.equal, kept, also))


def test_off_rows_give_no_gradient():
    layout = ThoughtLayout.at(torch.tensor([[1, -1]]), 2, 3, text_length=3, length=torch.tensor([[[2, 0], [0, 0]]]))
    x, weight, _ = drawn_inputs(5, layout)
    bias = weight.detach()[:, 0].clone().requires_grad_()
    out = thought_conv(x, weight, bias, layout)
    off = ~torch.cat([torch.ones(1, 3, dtype=torch.bool), layout.branches.live()], 1)
    assert not out[off].any()
    grad = torch.ones_like(out).masked_fill(off[..., None], torch.nan)
    dx, *others = torch.autograd.grad(out, (x, weight, bias), grad)
    assert not dx[off].any() and all(y.isfinite().all() for y in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(dtype):
    layout = drawn_layout(10)
    exact = [None if y is None else y.detach().to(dtype).double().requires_grad_() for y in drawn_inputs(7, layout)]
    inputs = [None if y is None else y.detach().to(dtype).requires_grad_() for y in exact]
    got, want = thought_conv(*inputs, layout), thought_conv(*exact, layout)
    pairs = [(got, want), *zip(gradients(got, inputs, 0), gradients(want.to(dtype).double(), exact, 0), strict=True)]
    for x, y in pairs:
        assert x.dtype == dtype
        ulp = torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 8)
        torch.testing.assert_close(x.double(), y, rtol=ulp, atol=ulp)


def test_checkpointing_and_compile():
    layout = ThoughtLayout.every_position(1, 4, 2, 3)
    inputs = drawn_inputs(3, layout)
    out = thought_conv(*inputs, layout)
    want = gradients(out, inputs, 0)
    again = torch.utils.checkpoint.checkpoint(thought_conv, *inputs, layout, use_reentrant=False)
    compiled = torch.compile(lambda *args: thought_conv(*args, layout), backend="aot_eager", fullgraph=True)(*inputs)
    for x in (again, compiled):
        assert torch.equal(x, out)
        assert all(map(torch.equal, gradients(x, inputs, 0), want))


def test_refusals():
    full = ThoughtLayout.every_position(1, 3, 1, 2, own="full")
    inputs = drawn_inputs(3, full)
    with pytest.raises(ValueError, match="thought_conv: layout must have own='causal'"):
        thought_conv(*inputs, full)
    cut = ThoughtLayout.at(torch.tensor([[2]]), 1, 6, lo=torch.tensor([[0, 0, 1]]))
    with pytest.raises(ValueError, match="thought_conv: lo must be the start of a document"):
        thought_conv(*inputs, cut)
    layout = ThoughtLayout.every_position(1, 3, 1, 2)
    x, weight, bias = inputs
    with pytest.raises(ValueError, match="weight must have shape"):
        thought_conv(x, weight[:2], bias, layout)
    with pytest.raises(ValueError, match="at least one column"):
        thought_conv(x, weight[:, :0], bias, layout)
    with pytest.raises(ValueError, match="x must have shape"):
        thought_conv(x, weight, bias, layout, x[:, :3])
    with pytest.raises(ValueError, match="tails must have shape"):
        thought_conv_decode(x[:, 3:], conv_tails(x[:, :3], layout, weight.shape[1] + 1), weight, bias)
