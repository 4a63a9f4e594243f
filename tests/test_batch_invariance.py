"""What the bits of a row depend on, as the table of docs/reliability.md has it."""

import pytest
import torch

from quietstar_kernels import ThoughtLayout, linear_logprob, sample_token, thought_attention, thought_decode
from quietstar_kernels.cpu import _library
from quietstar_kernels.testing.inputs import attention_inputs, decode_inputs, logprob_inputs, sample_inputs
from tests.kernels.drawn import pick, seeded
from tests.quietstar.common import text, wrap
from tests.quietstar.conftest import make_model

N, S = 2, 3
OPTIONS = ({}, {"window": 5, "softcap": 3.0})
BEFORE = 7  # tokens of a document, or of padding, before the text


@pytest.fixture(scope="module")
def products():
    """PyTorch's products, of which a manual promises nothing. Skips where they depend on the number of rows (4, 8, ...)."""
    x = torch.randn(700, 64, generator=seeded(0))
    for width in (32, 61, 64, 96, 500):
        weight = torch.randn(64, width, generator=seeded(width))
        for rows in (slice(8, 12), slice(60, 120), slice(0, 160), slice(0, 300), slice(400, 660)):
            if not torch.equal(x[rows] @ weight, (x @ weight)[rows]):
                pytest.skip("a row of a product depends on the number of rows here")


def outputs(q, k, v, sinks, layout, grad, **options):
    """out and the gradients of q, k and v."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = thought_attention(q, k, v, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def attended(B, L, dtype=torch.float32):
    layout = ThoughtLayout.every_position(B, L, N, S)
    inputs = attention_inputs(seeded(0), layout, 4, 2, 16, dtype=dtype)
    return layout, {**inputs, "grad": torch.randn(inputs["q"].shape, generator=seeded(1)).to(dtype)}


@pytest.mark.parametrize(
    "backend, options", [("reference", OPTIONS[1]), ("cpu", OPTIONS[0]), ("cpu", OPTIONS[1]), ("triton", OPTIONS[1])]
)
def test_attention_of_a_text_does_not_depend_on_the_batch(backend, options):
    B, L = (2, 4) if backend == "triton" else (5, 40)
    layout, inputs = attended(B, L)
    # The compiled CPU code sums dk and dv in parts, of which there are more for fewer texts.
    kept = 2 if backend == "cpu" else 4
    whole = outputs(layout=layout, backend=backend, **inputs, **options)[:kept]
    part = {name: None if x is None else x[1:2] for name, x in inputs.items()}
    alone = outputs(layout=ThoughtLayout.every_position(1, L, N, S), backend=backend, **part, **options)
    assert all(torch.equal(x[1:2], y) for x, y in zip(whole, alone, strict=False))


@pytest.mark.skipif(bool(_library.missing()), reason="PyTorch's products instead of compiled code")
@pytest.mark.parametrize("seed", range(12))
def test_attention_and_decoding_of_a_text_alone_in_a_batch_beside_padding_and_in_documents(seed):
    """Sizes on both sides of those where tiles, blocks of keys and parts change: H/G, rows of a branch, texts, windows."""
    draw = seeded(seed)
    L, S, before = pick(draw, [20, 130, 300, 400]), pick(draw, [3, 14, 150]), pick(draw, [7, 100, 250])
    G, group, K = pick(draw, [1, 2]), pick(draw, [1, 3, 8, 40]), pick(draw, [3, 16, 64])
    dtype = pick(draw, [torch.float32, torch.bfloat16, torch.float16])
    options = pick(draw, [{}, {"window": 40}, {"softcap": 3.0}])
    B, P, N = 3, min(L, pick(draw, [2, 20, 200]), 3000 // (S * group) + 2), 2
    anchors = torch.stack([torch.randperm(L, generator=draw)[:P].sort()[0] for _ in range(B)])
    layout = ThoughtLayout.at(anchors, N, S, text_length=L)
    own = (torch.arange(P)[:, None] * N * S + torch.arange(N * S)).flatten()
    documents = torch.tensor([[0] * before + [1] * L + [2] * 30])
    inside = torch.cat([before + torch.arange(L), before + L + 30 + own])
    texts = {
        "padding": (ThoughtLayout.from_padding(documents == 1, N, S, anchors[1:2] + before), inside),
        "alone": (ThoughtLayout.at(anchors[1:2], N, S, text_length=L), torch.arange(layout.M)),
        "fewer": (ThoughtLayout.at(anchors[1:2, :1], N, S, text_length=L), torch.arange(L + N * S)),
        "documents": (
            ThoughtLayout.from_documents(documents, N, S, torch.cat([torch.tensor([[1, 4]]), anchors[1:2] + before], 1)),
            torch.cat([before + torch.arange(L), before + L + 30 + 2 * N * S + own]),
        ),
    }
    inputs = attention_inputs(draw, layout, group * G, G, K, dtype=dtype)
    inputs |= {"sinks": None, "grad": torch.randn(inputs["q"].shape, generator=draw).to(dtype)}
    want = outputs(layout=layout, backend="cpu", **inputs, **options)[:2]
    for name, (other, rows) in texts.items():
        given = {}
        for key, x in inputs.items():
            if x is not None:
                noise = torch.randn(1, x.shape[1], other.M, K, generator=draw).to(dtype)
                given[key] = noise.index_copy(2, rows, x[1:2, :, : len(rows)])
        got = outputs(layout=other, backend="cpu", sinks=None, **given, **options)
        assert all(torch.equal(x.index_select(2, rows), y[1:2, :, : len(rows)]) for x, y in zip(got, want, strict=False)), name

    decoding = decode_inputs(draw, layout, group * G, G, K, dtype=dtype)
    want = thought_decode(**decoding, layout=layout, step=S - 1, backend="cpu", **options)
    for name, thoughts in (("alone", slice(None)), ("fewer", slice(0, N))):
        part = {key: None if x is None else x[1:2] for key, x in decoding.items()}
        part |= {key: part[key][:, :, thoughts] for key in ("q", "k_own", "v_own")}
        got = thought_decode(**part, layout=texts[name][0], step=S - 1, backend="cpu", **options)
        assert torch.equal(got, want[1:2, :, thoughts]), name


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_decoding_does_not_depend_on_the_batch(backend):
    layout = ThoughtLayout.every_position(4, 8, N, S)
    inputs = decode_inputs(seeded(0), layout, 4, 2, 16)
    whole = thought_decode(**inputs, layout=layout, step=1, backend=backend)
    part = {name: None if x is None else x[1:2] for name, x in inputs.items()}
    alone = ThoughtLayout.every_position(1, 8, N, S)
    assert torch.equal(whole[1:2], thought_decode(**part, layout=alone, step=1, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_ids_do_not_depend_on_the_rows(backend):
    inputs = sample_inputs(seeded(0), 160, 32, 500)
    ids, _ = sample_token(**inputs, seed=1, backend=backend)
    weight = {name: inputs.pop(name) for name in ("weight", "bias")}
    for rows in (slice(0, 1), slice(3, 5), slice(60, 120)):
        part = {name: x[rows] for name, x in inputs.items()}
        assert torch.equal(sample_token(**part, **weight, seed=1, backend=backend)[0], ids[rows])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_log_probabilities_do_not_depend_on_the_rows(backend, products):
    """Of rows that four divides, since PyTorch's product of others can be another; nor on whether logits are kept."""
    inputs = logprob_inputs(seeded(0), 160, 32, 500)
    want = linear_logprob(**inputs, return_entropy=True, backend=backend)
    for rows in (slice(0, 160), slice(8, 12), slice(60, 120)):
        part = inputs | {name: inputs[name][rows] for name in ("hidden", "targets")}
        got = linear_logprob(**part, return_entropy=True, backend=backend, keep_bytes=0)
        assert all(torch.equal(x, y[rows]) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("what", ["alone", "padding", "documents", "anchors", "chunks", "one thread"])
def test_thoughts_and_losses_of_a_text_do_not_depend_on_the_batch(what, products):
    """On a CPU, in training."""
    qs = wrap(make_model("qwen3")).train()
    ids, numbers, L = text(3, 20), torch.arange(3), 20
    want = qs(ids, sequence_ids=numbers, seed=5)
    rows, places, options = slice(None), slice(None), {}
    inputs, before = ids, torch.zeros(3, BEFORE, dtype=torch.long)
    if what == "alone":
        rows = slice(1, 2)
    elif what == "padding":
        inputs, options = torch.cat([before, ids], 1), {"attention_mask": torch.cat([before, torch.ones_like(ids)], 1)}
    elif what == "documents":
        inputs = torch.cat([text(3, BEFORE, 1), ids], 1)
        options = {"document_ids": torch.cat([before, torch.ones_like(ids)], 1)}
        numbers = torch.cat([before + 9, numbers[:, None].expand(3, L)], 1)
    elif what == "anchors":
        places, options = slice(None, None, 3), {"anchors": torch.arange(0, L, 3).expand(3, -1)}
    elif what == "chunks":
        qs.anchor_chunk = 6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if what == "one thread" else threads)
        got = qs(inputs[rows], sequence_ids=numbers[rows], seed=5, **options)
    finally:
        torch.set_num_threads(threads)
    for name in ("thought_ids", "logprob", "nll_base", "nll_mix", "reward", "weight"):
        own = getattr(want, name)[rows, slice(None) if name == "nll_base" else places]  # which has all positions
        assert torch.equal(getattr(got, name)[:, -own.shape[1] :], own), name
