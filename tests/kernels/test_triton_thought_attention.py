"""thought_attention in Triton: the tiles of GPUs, as other tests run small ones; one compile for all lengths."""

from functools import partial

import pytest
import torch

from quietstar_kernels import ThoughtLayout, thought_attention, thought_decode
from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.testing import (
    assert_op_close_as_plain,
    attention_inputs,
    attention_magnitudes,
    decode_inputs,
    forward_backward,
    plain_attention,
)

pytest.importorskip("triton")

from quietstar_kernels.triton import configs  # noqa: E402
from quietstar_kernels.triton import thought_attention as calls  # noqa: E402
from quietstar_kernels.triton import thought_decode as decode  # noqa: E402
from quietstar_kernels.triton._launch import near, plan  # noqa: E402
from quietstar_kernels.triton.configs import INTERPRETED  # noqa: E402
from quietstar_kernels.triton.thought_attention import backward, backward_keys  # noqa: E402
from quietstar_kernels.triton.thought_attention import forward as op  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"


def forward(q, k, v, layout, sinks):
    return op.thought_attention(q, k, v, layout.branches, AttentionOptions(q.shape[-1] ** -0.5, None, None, sinks))


@pytest.mark.skipif(not INTERPRETED, reason="for GPUs the other tests run these tiles")
@pytest.mark.kernels
@pytest.mark.parametrize("entry, apart", [(("sm_90", 2, 128), 11), (("sm_80", 4, 256), 90)], ids=str)
def test_shipped_tiles(entry, apart, monkeypatch):
    """Whole and masked blocks of text, tiles of several thoughts, thoughts of more rows than a block of own keys."""
    monkeypatch.setattr(op, "pick", lambda *_: configs.ATTENTION_FORWARD[entry])
    generator = torch.Generator().manual_seed(0)
    layout = ThoughtLayout.at(torch.arange(3, 300, apart)[None], 2, 19, text_length=300)
    dtype = {2: torch.float16, 4: torch.float32}[entry[1]]
    inputs = attention_inputs(generator, layout, 3, 1, entry[2], 40, sinks=True, dtype=dtype)
    assert_op_close_as_plain(forward, plain_attention, inputs, what=str(entry), layout=layout)


@pytest.mark.kernels
@pytest.mark.parametrize("own, window", [("causal", None), ("full", 25)])
def test_long_branches(own, window, monkeypatch):
    """Own rows in blocks without a mask and in those at both edges, and keys of branches in the tiles of text."""
    monkeypatch.setattr(backward_keys, "PROGRAMS", 1)
    monkeypatch.setattr(backward_keys, "LONG", 1)
    lo = torch.tensor([[0] * 14 + [14] * 6], device=DEVICE)
    anchors, lengths = torch.tensor([[13, 13, 13, 19]], device=DEVICE), torch.tensor([[50, 0, 7, 39]], device=DEVICE)
    layout = ThoughtLayout.packed(anchors, lengths, lo=lo, rows=101, own=own)
    generator = torch.Generator().manual_seed(0)
    inputs = attention_inputs(generator, layout, 2, 1, 16, 16, sinks=True)
    grad_out = torch.randn(inputs["q"].shape, generator=generator).to(DEVICE)
    on_triton = partial(thought_attention, return_lse=True, backend="triton")
    options = {"magnitudes": attention_magnitudes(inputs, grad_out), "layout": layout, "window": window}
    assert_op_close_as_plain(on_triton, plain_attention, inputs, (grad_out,), own, **options)


def test_texts_that_end_beside_the_edge_of_a_block():
    """A tile of rows for each branch, which sees all of a block of the text, or all but one key."""
    anchors = torch.tensor([[14, 15]], device=DEVICE)
    layout = ThoughtLayout.packed(anchors, torch.full_like(anchors, 32), 20)
    generator = torch.Generator().manual_seed(0)
    inputs = attention_inputs(generator, layout, 1, 1, 16, 16)
    grad_out = torch.randn(inputs["q"].shape, generator=generator).to(DEVICE)
    on_triton = partial(thought_attention, return_lse=True, backend="triton")
    options = {"magnitudes": attention_magnitudes(inputs, grad_out), "layout": layout}
    assert_op_close_as_plain(on_triton, plain_attention, inputs, (grad_out,), **options)


@pytest.mark.parametrize("row", [5, 45], ids=["text", "branch"])
def test_an_infinity_in_a_block_without_a_mask(row):
    """It makes all of a row NaN, not only the column that it is in."""
    layout = ThoughtLayout.packed(torch.tensor([[39]], device=DEVICE), torch.tensor([[70]], device=DEVICE), 40)
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, 1, 1, 16, 16)
    inputs["v"][0, 0, row, 3] = torch.inf
    out, lse = thought_attention(**inputs, layout=layout, return_lse=True, backend="triton")
    sees = layout.dense_mask()[0, :, row]
    assert torch.equal(lse[0, 0].isnan(), sees) and torch.equal(out[0, 0].isnan(), sees[:, None].expand(-1, 16))
    assert out[0, 0, ~sees].isfinite().all()


def packed(anchors, lengths, *rest, **options):
    return ThoughtLayout.packed(torch.tensor(anchors), torch.tensor(lengths), *rest, **options)


DOCUMENTS = ThoughtLayout.from_documents((torch.arange(80) // 40)[None], 3, 4, torch.arange(80)[None, ::7])
PRODUCTS = {  # a layout, options, and the most products over useful ones in the forward and in the backward
    "every": (ThoughtLayout.every_position(2, 40, 2, 5), {}, 2.41, 3.19),
    "left": (ThoughtLayout.from_padding(torch.arange(70) >= torch.tensor([[12], [0]]), 1, 3), {"window": 40}, 2.2, 3.29),
    "documents": (DOCUMENTS, {}, 2.03, 3.17),
    "branches": (packed([[9, 9, 35]], [[50, 0, 41]], 40, rows=100), {"query_rows": "thoughts"}, 1.69, 2.55),
}


@pytest.fixture
def multiplied(monkeypatch):
    """How much each product multiplied, in turn."""
    from triton.runtime.interpreter import InterpreterBuilder

    found, dot = [], InterpreterBuilder.create_dot

    def count(self, a, b, *rest):
        found.append(a.data.size * b.data.shape[-1])
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    return found


@pytest.mark.kernels
@pytest.mark.skipif(not INTERPRETED, reason="counts what Triton's interpreter runs")
@pytest.mark.parametrize("name", PRODUCTS)
def test_blocks_that_nobody_sees_are_skipped(name, multiplied):
    """Dense attention would take 19, 11, 10 and 3.4 times the useful products."""
    layout, options, *most = PRODUCTS[name]
    rows = options.get("query_rows", "all")
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, 2, 1, 32, 64, query_rows=rows)
    inputs = {name: x.requires_grad_() for name, x in inputs.items() if x is not None}
    out = thought_attention(**inputs, layout=layout, backend="triton", **options)
    forward = sum(multiplied)
    out.sum().backward()
    useful = 2 * int(layout.dense_mask(options.get("window"))[:, -out.shape[2] :].sum()) * (32 + 64)
    assert forward / useful <= most[0] and (sum(multiplied) - forward) / (2.5 * useful) <= most[1]


@pytest.mark.long
@pytest.mark.skipif(not INTERPRETED, reason="counts what Triton's interpreter runs")
def test_products_of_a_backward_beside_gluon(multiplied, monkeypatch, record_property):
    """Own keys and dq with the tiles of sm_90. The kernel of the text's dK, dV isn't interpreted: what it multiplies is counted
    from the layout, as a group of 64 keys passes over 64 rows that see none of them.
    """
    layout, L = ThoughtLayout.every_position(1, 256, 2, 14), 256
    branches, options = layout.branches, AttentionOptions(0.25, None, None, None)
    q, k, v = (torch.zeros(1, heads, layout.M, 16, dtype=torch.float16) for heads in (4, 1, 1))
    known = plan("products", (q, k, v))
    facts = branches, branches.contiguous()
    tables = backward.row_tables(q, q, torch.zeros(q.shape[:3]), None, *facts, None, None, known)
    inputs = backward.Inputs(q, q, k, v, *facts, options, tables, known)
    monkeypatch.setattr(backward, "pick", lambda *_: configs.ATTENTION_BACKWARD_QUERIES["sm_90", 2, 128])
    multiplied.clear()
    backward.query_gradient(inputs)
    short = configs.ATTENTION_BACKWARD_SHORT_KEYS["sm_90", 2, 128]
    backward_keys._launch(inputs, None, torch.empty_like(k), torch.empty_like(v), 1, short)

    pairs, ranges = 0, backward_keys.row_ranges(inputs, 64)[0].tolist()
    first, count = (x[: layout.M] for x in (tables.first, tables.text_count))
    for block in range(0, len(ranges), 2):  # a program's two groups take the rows of both
        ends, starts, stops = zip(*ranges[block : block + 2], strict=True)
        segments = (block * 64, max(ends)), (L + min(starts), L + max(stops))
        for row in (row for start, stop in segments for row in range(start, stop, 64)):
            sees = torch.arange(row, min(row + 64, segments[row >= L][1]))
            for n in (block * 64, block * 64 + 64):
                pairs += 64 * 64 * bool(((first[sees] < n + 64) & ((first + count)[sees] > n)).any())
    executed = sum(multiplied) / 16 + 4 * 4 * pairs  # products of pairs, under four heads
    ratio = executed / (5 * 4 * int(layout.dense_mask()[0].sum()))
    record_property("table", f"a backward beside Gluon executes {ratio:.2f} times the useful products")
    assert ratio <= 1.85


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU other tests do so, without a stand-in")
@pytest.mark.parametrize("B, L, N, compiles", [(1, 1, 1, True), (0, 3, 2, False), (2, 0, 2, False), (2, 3, 0, False)])
def test_calls_without_rows_compile_no_backward(B, L, N, compiles, monkeypatch):
    compiled = []
    monkeypatch.setattr(calls, "INTERPRETED", False)
    monkeypatch.setattr(calls, "_compiled", set())
    monkeypatch.setattr(calls, "compile_at_once", lambda *given: compiled.append(given))
    layout = ThoughtLayout.every_position(B, L, 2, 2)
    layout = layout if N else layout.text_only()
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, 2, 1, 16, 16, query_rows="thoughts")
    q, k, v = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    for _ in range(2):
        calls.thought_attention(q, k, v, layout.branches, AttentionOptions(1.0, None, None, None))
    assert len(compiled) == compiles


def test_rows_that_are_too_far_apart_for_offsets_of_32_bits_are_copied():
    x = torch.empty_strided((1, 2, 3, 16), (1 << 30, 16, 1 << 23, 1), device="meta")
    assert near(x).stride() == (96, 48, 16, 1) and near(x[:, :, :, ::2].expand(4, 2, 3, 8)).stride(-1) == 1
    close = torch.empty_strided((1, 2, 3, 16), (1 << 30, 16, 1 << 20, 1), device="meta")
    assert near(close) is close


@pytest.mark.kernels
def test_the_order_of_programs_changes_nothing(monkeypatch):
    """Four pairs of a batch row and a key head take turns all together, one by one, and three before the last one."""
    generator = torch.Generator().manual_seed(0)
    layout = ThoughtLayout.at(torch.tensor([[3, 11], [9, 17]], device=DEVICE), 2, 3, text_length=18)
    inputs = attention_inputs(generator, layout, 4, 2, 16, 16, sinks=True)
    grad_out = torch.randn(inputs["q"].shape, generator=generator).to(DEVICE)
    to_decode = decode_inputs(generator, layout, width=16)

    def run():
        attention = partial(thought_attention, return_lse=True, backend="triton")
        (out, lse), grads = forward_backward(attention, inputs, (grad_out,), layout=layout)
        return out, lse, *grads.values(), thought_decode(**to_decode, layout=layout, step=1, backend="triton")

    want = run()
    for together in (1, 3):
        for module in (op, backward, backward_keys, decode):
            monkeypatch.setattr(module, "pairs_together", lambda *_: together)  # noqa: B023, called at once
        assert all(torch.equal(x, y) for x, y in zip(want, run(), strict=True))
