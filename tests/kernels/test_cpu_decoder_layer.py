"""rms_norm, rotary, rotary_decode and gated_activation in the compiled library for CPUs, judged by the reference in fp64."""

import warnings
from functools import partial

import pytest
import torch

from quietstar_kernels import _dispatch, gated_activation, rms_norm, rotary, rotary_decode
from quietstar_kernels.cpu import _library
from quietstar_kernels.testing import assert_op_close_as_plain, forward_backward
from tests.kernels.drawn import seeded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(_library.missing() is not None, reason="there is no CPU library here")
of_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(seed, *shape, dtype=torch.float32, strided=False):
    """``strided``: rows of a wider tensor."""
    x = torch.randn(*shape[:-1], shape[-1] * (1 + strided), generator=seeded(seed)).to(dtype)
    return x[..., : shape[-1]]


def judge(op, inputs, grads, **options):
    assert_op_close_as_plain(
        partial(op, backend="cpu"), partial(op, backend="reference"), inputs, grads, str(options), **options
    )


@compiled
@of_all_dtypes
@pytest.mark.parametrize("delta", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("D", [1, 7, 96, 100, 1030])
def test_rms_norm(D, delta, dtype):
    weight = normal(0, D, dtype=DTYPES[D % 3])
    for rows in (0, 1, 300):
        shape = (rows // 2, 2, D) if D == 96 else (rows, D)
        inputs = {"x": normal(1, *shape, dtype=dtype, strided=True), "weight": weight}
        inputs["delta"] = None if delta is None else normal(2, *shape, dtype=delta)
        grads = normal(3, *shape), normal(4, *shape)
        for options in ({}, {"offset": 1.0, "dtype": DTYPES[D % 2], "eps": 0.1}):
            if delta is None:  # the total is x then, of no dtype's error
                judge(lambda **all: rms_norm(**all)[1], inputs, grads[:1], **options)
            else:
                judge(rms_norm, inputs, grads, **options)


def rotary_inputs(dtype, K, merged, norms, B=2, n=5, H=4, G=2, tables=2):
    inputs = {"qkv": normal(0, B, n, (H + 2 * G * merged) * K, dtype=dtype, strided=True)}
    inputs |= {name: None if merged else normal(i, B, n, G * K, dtype=dtype) for i, name in enumerate("kv", 1)}
    inputs |= {"q_weight": normal(3, K) if "q" in norms else None}
    inputs |= {"k_weight": normal(4, K, dtype=torch.bfloat16) if "k" in norms else None}
    return inputs, {"cos": normal(5, tables, n, K, dtype=dtype), "sin": normal(6, tables, n, K), "heads": (H, G)}


@compiled
@of_all_dtypes
@pytest.mark.parametrize("norms", ["", "q", "qk"])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("K", [6, 7, 12, 64, 96])
def test_rotary(K, merged, norms, dtype):
    for tables, n in ((1, 0), (2, 1), (1, 70)):
        inputs, options = rotary_inputs(dtype, K, merged, norms, n=n, tables=tables)
        grads = [normal(7 + i, 2, n, heads, K, dtype=dtype).transpose(1, 2) for i, heads in enumerate((4, 2, 2))]
        judge(rotary, inputs, grads, offset=1.0, **options)


@compiled
@of_all_dtypes
@pytest.mark.parametrize("merged", [True, False])
def test_rotary_decode(merged, dtype):
    """It writes what rotary returns, and nothing else."""
    inputs, options = rotary_inputs(dtype, 12, merged, "qk")
    expected = rotary(**inputs, **options, backend="cpu")
    own = [torch.full((2, 5, 3, 2, 16), 7.0, dtype=dtype).permute(0, 3, 1, 2, 4)[..., :12] for _ in range(2)]
    before = own[0]._version
    q = rotary_decode(**inputs, **options, k_own=own[0], v_own=own[1], step=torch.tensor(1), backend="cpu")
    assert torch.equal(q, expected[0]) and own[0]._version > before
    for cache, rows in zip(own, expected[1:], strict=True):
        assert torch.equal(cache[:, :, :, 1], rows) and bool((cache[:, :, :, ::2] == 7).all())


@compiled
@of_all_dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("merged", [True, False])
def test_gated_activation(merged, activation, dtype):
    for rows, width in ((0, 5), (1, 1), (30, 7), (9, 100), (300, 768)):
        inputs = {"gate": 4 * normal(0, rows, width * (1 + merged), dtype=dtype, strided=True)}
        inputs["up"] = None if merged else normal(1, 3, rows, width, dtype=dtype)[1]
        judge(gated_activation, inputs, (normal(2, rows, width),), activation=activation)


@compiled
def test_what_is_not_finite_stays_in_its_row():
    x, up = normal(0, 5, 40), normal(1, 5, 40)
    x[1, 39], x[3, 2] = torch.nan, torch.inf
    cos, sin = normal(2, 5, 40)[None], normal(3, 5, 40)[None]
    for op in (
        lambda backend: rms_norm(x, up[0], backend=backend)[1],
        lambda backend: gated_activation(x, up, backend=backend),
        lambda backend: gated_activation(-x, up, "gelu_tanh", backend=backend),
        lambda backend: torch.cat(rotary(x[None], x[None], x[None], cos, sin, (1, 1), up[0], backend=backend)[:2]),
    ):
        torch.testing.assert_close(op("cpu"), op("reference"), equal_nan=True)


@compiled
@of_all_dtypes
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    x, up, weight = normal(0, 1, 2000, 256, dtype=dtype), normal(1, 1, 2000, 256, dtype=dtype), normal(2, 256)
    turned, options = rotary_inputs(dtype, 64, True, "qk", n=500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            found = forward_backward(partial(rms_norm, backend="cpu"), {"x": x, "weight": weight, "delta": up}, (x, up))
            found += forward_backward(partial(gated_activation, backend="cpu"), {"gate": x, "up": up}, (x,))
            grads = [normal(i, 2, heads, 500, 64) for i, heads in enumerate((4, 2, 2))]
            found += forward_backward(partial(rotary, backend="cpu"), turned, grads, **options)
            results.append([y for part in found for y in (part.values() if isinstance(part, dict) else part)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_fp64_is_left_to_the_reference():
    cpu = torch.device("cpu")
    for op in _dispatch.OF_A_LAYER:
        assert [_dispatch.choose(op, "auto", cpu, dtype) for dtype in DTYPES] == ["cpu"] * 3
        assert _dispatch.choose(op, "auto", cpu, torch.float64) == "reference"
    wide = {"x": normal(0, 3, 8), "weight": normal(1, 8).double(), "delta": normal(2, 3, 8)}
    judge(rms_norm, wide, (normal(3, 3, 8),) * 2, dtype=torch.float64)


def test_without_the_library_the_reference_runs_and_nothing_is_said(monkeypatch):
    monkeypatch.setattr(_library, "missing", lambda: "a test leaves it out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rms_norm(normal(0, 3, 8), normal(1, 8))
    with pytest.raises(ValueError, match="a test leaves it out"):
        gated_activation(normal(0, 3, 8), backend="cpu")
