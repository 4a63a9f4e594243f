"""What a row may not see doesn't change its result, and neither does NaN in rows that are off or padded."""

from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, thought_attention
from quietstar_kernels.testing import BRANCH_KINDS, attention_inputs, forward_backward, random_layout

HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 6e4}
KINDS = ["every", "anchors", "left", "right", "both", "documents", "any_lo", "ragged", *BRANCH_KINDS]


def run(backend, layout, inputs, grad_out, **options):
    op = partial(thought_attention, return_lse=True, backend=backend)
    (out, lse), grads = forward_backward(op, inputs, (grad_out,), layout=layout, **options)
    return out, lse, grads


def scrambled(x, hidden, generator):
    """x [B,G,M,...] with huge numbers of either sign where ``hidden`` [B,M] is True."""
    sign = torch.randint(0, 2, x.shape, generator=generator).to(x.device) * 2 - 1
    return torch.where(hidden[:, None, :, None], (sign * HUGE[x.dtype]).to(x.dtype), x)


OPTIONS = [{}, {"window": 3}, {"softcap": 2.0}, {"query_rows": "thoughts"}]
CASES = [(kind, x, dtype) for kind in KINDS for x in OPTIONS for dtype in HUGE if dtype == torch.float32 or not x]


@pytest.mark.parametrize("kind, options, dtype", CASES, ids=str)
def test_huge_values_where_a_row_may_not_look(backend, kind, options, dtype, device, interpreted, narrow):
    """For single rows: if all that the row may not see is huge, its output and gradients stay bitwise the same."""
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    generator = torch.Generator().manual_seed(7)
    layout = random_layout(generator, kind, 2, 12, 2, 3, device=device)
    rows = options.get("query_rows", "all")
    inputs = attention_inputs(generator, layout, 2, 1, *narrow, sinks=True, query_rows=rows, dtype=dtype)
    mask = layout.dense_mask(options.get("window"))
    skip = 0 if rows == "all" else layout.L
    rows_on = mask[:, skip:].any(-1).any(0).nonzero()[:, 0].tolist()
    chosen = torch.randperm(len(rows_on), generator=generator)[: 1 if interpreted else 4].tolist()
    assert chosen and not mask.all()
    for row in (rows_on[i] for i in chosen):
        visible = mask[:, skip + row]
        grad_out = torch.zeros(*inputs["q"].shape[:3], narrow[1], dtype=dtype, device=device)
        grad_out[:, :, row] = torch.randn(layout.B, 2, narrow[1], generator=generator).to(device, dtype)
        changed = {name: scrambled(inputs[name], ~visible, generator) for name in ("k", "v")}
        out, lse, grads = run(backend, layout, inputs, grad_out, **options)
        out_changed, lse_changed, grads_changed = run(backend, layout, inputs | changed, grad_out, **options)
        assert torch.equal(out[:, :, row], out_changed[:, :, row]), f"row {row}"
        assert torch.equal(lse[:, :, row], lse_changed[:, :, row]), f"row {row}"
        assert torch.equal(grads["q"][:, :, row], grads_changed["q"][:, :, row]), f"row {row}: dq"
        for name in ("k", "v"):
            seen, seen_changed = (x[name].transpose(1, 2)[visible] for x in (grads, grads_changed))
            assert torch.equal(seen, seen_changed), f"row {row}: d{name}"
            assert (grads_changed[name].transpose(1, 2)[~visible] == 0).all(), f"row {row}: d{name} of invisible keys"
        assert torch.equal(grads["sinks"], grads_changed["sinks"]), f"row {row}: dsinks"


def poisoned(inputs, bad, names=("q", "k", "v"), poison=torch.nan):
    """The inputs with NaN, or other ``poison``, in packed rows ``bad`` [B,M]; q may hold the last rows only."""
    rows = inputs["q"].shape[2]
    where = {name: bad[:, bad.shape[1] - rows :] if name == "q" else bad for name in names}
    return inputs | {name: inputs[name].masked_fill(where[name][:, None, :, None], poison) for name in names}


def assert_same_where(good, bad, keep, what):
    """[B,H,rows,...] tensors agree bitwise in the rows ``keep`` [B,rows]."""
    assert torch.equal(good.transpose(1, 2)[keep], bad.transpose(1, 2)[keep]), what


@pytest.mark.parametrize("query_rows, softcap", [("all", 2.0), ("thoughts", None)])
@pytest.mark.parametrize("kind", ["anchors", "left", "both", "documents", "ragged", *BRANCH_KINDS])
def test_nan_in_rows_that_are_off(backend, kind, query_rows, softcap, device, interpreted, narrow):
    """q, k, v and the gradient hold NaN in every row that is off: nothing changes at all."""
    seen = 0
    for seed in [1] if interpreted else range(5):
        generator = torch.Generator().manual_seed(seed)
        layout = random_layout(generator, kind, 2, 10, 2, 4, device=device)
        inputs = attention_inputs(generator, layout, 2, 1, *narrow, sinks=True, query_rows=query_rows)
        text = torch.zeros(layout.B, layout.L, dtype=torch.bool, device=device)
        off = torch.cat([text, ~layout.live().flatten(1)], 1)
        rows_off = off[:, layout.M - inputs["q"].shape[2] :]
        grad_out = torch.randn(*inputs["q"].shape[:3], narrow[1], generator=generator).to(device)
        bad_grad = grad_out.masked_fill(rows_off[:, None, :, None], torch.nan)
        options = {"query_rows": query_rows, "softcap": softcap}
        out, lse, grads = run(backend, layout, inputs, grad_out, **options)
        bad_out, bad_lse, bad_grads = run(backend, layout, poisoned(inputs, off), bad_grad, **options)
        assert torch.equal(out, bad_out) and torch.equal(lse, bad_lse), f"seed {seed}"
        assert all(torch.equal(grads[name], bad_grads[name]) for name in grads), f"seed {seed}"
        seen += int(off.sum())
    assert seen


@pytest.mark.parametrize("query_rows, softcap", [("all", 2.0), ("thoughts", None)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_in_padded_text(backend, side, query_rows, softcap, device, narrow):
    """k and v hold NaN in padded text: real rows and their gradients don't change, if padded rows have no gradient."""
    generator = torch.Generator().manual_seed(5)
    text = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).bool()
    text = (text if side == "left" else text.flip(1)).to(device)
    layout = ThoughtLayout.from_padding(text, thoughts=2, rows=3)
    real = torch.cat([text, layout.live().flatten(1)], 1)
    inputs = attention_inputs(generator, layout, 2, 1, *narrow, sinks=True, query_rows=query_rows)
    rows_real = real[:, layout.M - inputs["q"].shape[2] :]
    grad_out = torch.randn(*inputs["q"].shape[:3], narrow[1], generator=generator).to(device)
    grad_out = grad_out.masked_fill(~rows_real[:, None, :, None], 0)
    options = {"query_rows": query_rows, "softcap": softcap}
    out, lse, grads = run(backend, layout, inputs, grad_out, **options)
    bad_out, bad_lse, bad_grads = run(backend, layout, poisoned(inputs, ~real, ("k", "v")), grad_out, **options)
    assert_same_where(out, bad_out, rows_real, "out")
    assert_same_where(lse, bad_lse, rows_real, "lse")
    assert_same_where(grads["q"], bad_grads["q"], rows_real, "dq")
    assert_same_where(grads["k"], bad_grads["k"], real, "dk")
    assert_same_where(grads["v"], bad_grads["v"], real, "dv")
    assert torch.equal(grads["sinks"], bad_grads["sinks"]), "dsinks"


@pytest.mark.parametrize(("names", "poison"), [(("k", "v"), torch.nan), (("v",), torch.inf), (("v",), -torch.inf)])
@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("place", ["text", "thought"])
def test_nan_that_a_row_sees(backend, place, options, names, poison, device, narrow):
    """One row of k and v holds NaN, or one of v infinity: the rows that see it are NaN, forward and dq, and no other."""
    generator = torch.Generator().manual_seed(6)
    layout = random_layout(generator, "anchors", 1, 40, 2, 3, device=device)
    inputs = attention_inputs(generator, layout, 2, 1, *narrow, sinks=True)
    mask = layout.dense_mask(options.get("window"))
    row = 5 if place == "text" else layout.L + 4
    bad = torch.arange(layout.M, device=device)[None] == row
    grad_out = torch.randn(*inputs["q"].shape[:3], narrow[1], generator=generator).to(device)
    out, lse, grads = run(backend, layout, poisoned(inputs, bad, names, poison), grad_out, **options)
    sees = mask[:, None, :, row].expand_as(lse)
    assert sees.any() and not sees.all()
    assert torch.equal(lse.isnan(), sees)
    for result in (out, grads["q"]):
        assert torch.equal(result.isnan(), sees[..., None].expand_as(result))
