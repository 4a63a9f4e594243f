"""sample_token in CUDA: chunks of vocabulary and rows, which must not change results, and their memory."""

import math

import pytest
import torch

from quietstar_kernels import sample_token
from quietstar_kernels.cuda import sample_token as op
from quietstar_kernels.testing import sample_inputs


@pytest.fixture(autouse=True)
def device(cuda):
    return cuda


def make(device, rows, vocabulary, **options):
    return sample_inputs(torch.Generator().manual_seed(0), rows, 8, vocabulary, device=device, **options)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"softcap": 3.0, "banned": (0, 128, 999)}], ids=str)
def test_chunks_of_any_size_draw_the_same(monkeypatch, device, options):
    inputs = make(device, 50, 1000, bias=True)
    want, want_logprob = sample_token(**inputs, seed=3, backend="cuda", **options)
    for rows, columns in [(50, 128), (50, 384), (7, 1024), (1, 128)]:
        monkeypatch.setattr(op, "ROWS", rows)
        monkeypatch.setattr(op, "LOGITS", rows * columns)
        ids, logprob = sample_token(**inputs, seed=3, backend="cuda", **options)
        assert torch.equal(ids, want), f"chunks of {rows} rows and {columns} ids"
        torch.testing.assert_close(logprob, want_logprob, rtol=0, atol=2e-6)


def test_one_workspace_holds_every_chunk(monkeypatch, device):
    """There are 16 times as many logits as it holds. All chunks but the last have whole blocks of the race."""
    chunks = []
    monkeypatch.setattr(op, "LOGITS", 5120)
    product = op.product

    def spy(hidden, weight, out):
        chunks.append((out.data_ptr(), out.shape[0], out.stride(0), out.shape[1]))
        product(hidden, weight, out)

    monkeypatch.setattr(op, "product", spy)
    sample_token(**make(device, 20, 4000), seed=3, backend="cuda")
    assert len(chunks) == math.ceil(4000 / 256) and len({address for address, *_ in chunks}) == 1
    assert all(rows * stride <= 5120 for _, rows, stride, _ in chunks)
    assert [width for *_, width in chunks] == [256] * 15 + [160]


def test_a_bias_of_any_stride(device):
    """The kernel reads it four numbers at a time."""
    inputs = make(device, 30, 700, bias=True)
    want = sample_token(**inputs, seed=3, backend="cuda")
    for stride in (1, 3):
        odd = torch.zeros(1 + 700 * stride, device=device)[1::stride][:700].copy_(inputs["bias"])
        got = sample_token(**(inputs | {"bias": odd}), seed=3, backend="cuda")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_draw_has_weight_despite_rounding(device):
    """Only one id of each block is allowed: however the sums round, no draw gives another id."""
    banned = [i for i in range(1024) if i % 128 != 77]
    inputs = make(device, 500, 1024)
    ids, logprob = sample_token(**inputs, seed=3, banned=banned, backend="cuda")
    assert (ids % 128 == 77).all() and logprob.isfinite().all() and len(ids.unique()) > 2
