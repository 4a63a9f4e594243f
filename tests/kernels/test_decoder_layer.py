"""The ops of a decoder layer, rms_norm, rotary, rotary_decode and gated_activation, by the house rule against fp64."""

from functools import partial

import pytest
import torch

from quietstar_kernels import gated_activation, rms_norm, rotary, rotary_decode
from quietstar_kernels.testing import assert_op_close_as_plain, plain_gated, plain_norm, plain_rotary
from tests.kernels.drawn import normal, seeded
from tests.kernels.test_derivatives import OurCalls

OP = "rms_norm"  # all four have the same back ends
F32, F16 = torch.float32, torch.float16
B, N = 2, 5  # batch and rows
HEADS = {"4 of 12": (4, 2, 12), "3 of 16": (3, 1, 16), "many": (40, 33, 128)}


def grads(*shapes):
    return tuple(normal(seeded(i), *shape) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("shape", [(3, N, 96), (1, 1), (0, 64), (7,), (2, 9000)], ids=str)
@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "no delta"])
def test_norm(shape, with_delta, dtype, backend, device):
    x, weight, delta = (normal(seeded(i), *s, dtype=dtype, device=device) for i, s in enumerate((shape, shape[-1:], shape)))
    inputs = {"x": x, "weight": weight, "delta": delta if with_delta else None}
    options = {"offset": 1.0 if with_delta else 0.0, "eps": 1e-5}
    to = [x.to(device) for x in grads(shape, shape)]
    assert_op_close_as_plain(partial(rms_norm, backend=backend), plain_norm, inputs, to, **options)


@pytest.mark.parametrize("x, delta, weight, out", [(F32, F16, F32, F16), (F16, F32, F32, None), (F32, None, F16, F16)])
def test_norm_of_several_dtypes(x, delta, weight, out, backend, device):
    make = lambda seed, dtype, *shape: normal(seeded(seed), *shape, dtype=dtype, device=device)  # noqa: E731
    inputs = {"x": make(0, x, 3, N, 96), "weight": make(1, weight, 96), "delta": delta and make(2, delta, 3, N, 96)}
    results = rms_norm(**inputs, dtype=out, backend=backend)
    assert [y.dtype for y in results] == [x, out or x]
    to = [y.to(device) for y in grads((3, N, 96), (3, N, 96))]
    assert_op_close_as_plain(partial(rms_norm, backend=backend), plain_norm, inputs, to, dtype=out)


def test_gradients_of_one_result(backend, device):
    x, delta = (normal(seeded(i), 4, 24, device=device).requires_grad_() for i in range(2))
    weight = torch.ones(24, device=device)  # which needs none
    for i in range(2):
        got, want = (torch.autograd.grad(f(x, weight, delta=delta)[i].sin().sum(), (x, delta)) for f in (
            partial(rms_norm, backend=backend), plain_norm
        ))  # fmt: skip
        torch.testing.assert_close(got, want)
    assert rms_norm(x, weight, backend=backend)[0] is x


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, N, 100), (1, 1500), (0, 8), (9,)], ids=str)
def test_gated(shape, activation, dtype, backend, device):
    gate, up = (normal(seeded(i), *shape, dtype=dtype, device=device) * (4 - 3 * i) for i in range(2))
    op, to = partial(gated_activation, backend=backend), [x.to(device) for x in grads(shape)]
    assert_op_close_as_plain(op, plain_gated, {"gate": gate, "up": up}, to, activation=activation)
    assert_op_close_as_plain(op, plain_gated, {"gate": torch.cat([gate, up], -1)}, to, activation=activation)


def turned(heads, merged, weights, dtype, device, batch=B, n=N, cos_batch=B):
    """Inputs of ``rotary``, its options, and gradients of its results."""
    H, G, K = heads
    shapes = {"qkv": (batch, n, (H + 2 * G if merged else H) * K)} | {x: (batch, n, G * K) for x in "kv" if not merged}
    shapes |= {f"{x}_weight": (K,) for x in weights}
    inputs = {name: normal(seeded(i), *shape, dtype=dtype, device=device) for i, (name, shape) in enumerate(shapes.items())}
    cos, sin = normal(seeded(9), 2, cos_batch, n, K, dtype=dtype, device=device).sin()
    to = [x.to(device) for x in grads(*((batch, heads, n, K) for heads in (H, G, G)))]
    return dict.fromkeys("kv") | inputs, {"cos": cos, "sin": sin, "heads": (H, G), "offset": float(len(weights) == 2)}, to


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("weights", ["", "qk", "k"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "separate"])
@pytest.mark.parametrize("heads", HEADS)
def test_rotary(heads, merged, weights, dtype, backend, device):
    inputs, options, to = turned(HEADS[heads], merged, weights, dtype, device, cos_batch=1 if merged else B)
    assert_op_close_as_plain(partial(rotary, backend=backend), plain_rotary, inputs, to, **options)


@pytest.mark.parametrize("batch, n", [(0, 3), (2, 0), (1, 1)])
def test_rotary_of_few_rows(batch, n, backend, device):
    for merged in (True, False):
        inputs, options, to = turned((4, 2, 12), merged, "qk", F32, device, batch, n, cos_batch=1)
        assert_op_close_as_plain(partial(rotary, backend=backend), plain_rotary, inputs, to, **options)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "separate"])
def test_decode_writes_one_row(merged, backend, device):
    inputs, options, _ = turned((4, 2, 12), merged, "qk", F32, device)
    q, k, v = rotary(**inputs, **options, backend=backend)
    for step in (1, torch.tensor(1, device=device)):
        own = torch.full((B, 3, 2, N, 4, 24), 7.0, device=device)[:, ::2, ..., :12].transpose(0, 1)
        version = own._version
        with torch.no_grad():
            got = rotary_decode(**inputs, **options, k_own=own[0], v_own=own[1], step=step, backend=backend)
        assert torch.equal(got, q) and torch.equal(own[:, :, :, :, 1], torch.stack([k, v])) and own._version > version
        assert (own[:, :, :, :, [0, 2, 3]] == 7).all()


def strided(x):
    """The same numbers, every other row and part of a row of a larger tensor that has NaN elsewhere."""
    large = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), torch.nan)
    large[..., ::2, 2:-1] = x
    return large[..., ::2, 2:-1]


def test_strides_and_expanded_gradients(backend, device):
    inputs, options, _ = turned((4, 2, 12), False, "qk", F32, device)
    x, y = inputs["qkv"], inputs["qkv"].sin()
    cases = [
        (lambda x, y: rms_norm(x, x[0, 0], delta=y, backend=backend), (x, y)),
        (lambda x: rms_norm(x, x[0, 0], backend=backend), (x,)),
        (lambda x, y: gated_activation(x, y, backend=backend), (x, y)),
        (lambda x: gated_activation(x, backend=backend), (x,)),
        (lambda q, k, v: rotary(q, k, v, **options, backend=backend), [inputs[name] for name in ("qkv", "k", "v")]),
    ]
    for op, given in cases:
        found = []
        for layout in (lambda x: x, strided, lambda x: x.mT.contiguous().mT):
            leaves = [layout(x).detach().requires_grad_() for x in given]
            out = op(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            found.append([*out, *torch.autograd.grad(sum(x.sum() for x in out), leaves)])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-5)


def test_nan_stays_in_its_row(backend, device):
    x = normal(seeded(0), 6, 48, device=device)
    x[2, 5] = torch.nan
    x.requires_grad_()
    inputs, options, _ = turned((2, 1, 12), True, "qk", F32, device, batch=1, n=6, cos_batch=1)
    ops = [lambda x: rms_norm(x, torch.ones(48, device=device), delta=x, backend=backend)[1]]
    ops += [lambda x: gated_activation(x, backend=backend)]
    ops += [lambda x: rotary(**inputs | {"qkv": x[None]}, **options, backend=backend)[0].transpose(1, 2)[0].flatten(1)]
    for op in ops:
        out = op(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
        for bad in (out, grad):
            assert bad.isnan().any(1).tolist() == [False, False, True, False, False, False]


def everything(x, delta, weight, qkv, cos, sin, qk_weight, own):
    total, out = rms_norm(x, weight, delta=delta)
    q, k, v = rotary(qkv, None, None, cos, sin, (4, 2), qk_weight, qk_weight)
    with torch.no_grad():
        step = rotary_decode(qkv, None, None, cos, sin, (4, 2), own[0], own[1], 1)
    return gated_activation(out), gated_activation(out, total, "gelu_tanh"), q, k, v, step, own.sum()


def all_inputs(dtype):
    inputs, options, _ = turned((4, 2, 12), True, "q", dtype, "cpu")
    x, delta = normal(seeded(3), 2, 2, 3, 24, dtype=dtype)
    own = torch.zeros(2, B, 2, N, 3, 12, dtype=dtype)
    leaves = [y.requires_grad_() for y in (x, delta, x[0, 0].clone().detach(), inputs["qkv"], inputs["q_weight"])]
    return [*leaves[:4], options["cos"], options["sin"], leaves[4], own], leaves


def test_gradcheck():
    inputs, leaves = all_inputs(torch.float64)
    differentiable = lambda *leaves: everything(*leaves[:4], *inputs[4:6], leaves[4], inputs[7])[:5]  # noqa: E731
    assert torch.autograd.gradcheck(differentiable, leaves)


def test_compiled():
    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        inputs, leaves = all_inputs(F32)
        out = function(*inputs)
        results.append([*out, inputs[-1], *torch.autograd.grad(sum(x.sin().sum() for x in out), leaves)])
        results.append([x.stride() for x in out])
    assert all(map(torch.equal, results[0], results[2])) and results[1] == results[3]


def test_opcheck():
    with OurCalls() as ours:
        inputs, leaves = all_inputs(F32)
        torch.autograd.grad(sum(x.sum() for x in everything(*inputs)), leaves)
    assert len({called._opname for called, _ in ours.calls}) == 7
    for called, args in ours.calls:
        torch.library.opcheck(called, args, test_utils=("test_schema", "test_faketensor"))


def test_deterministic(backend, device):
    inputs, options, to = turned((4, 2, 12), True, "qk", F32, device)
    x = normal(seeded(0), 40, 96, device=device)
    for op, given, grad in (
        (partial(rotary, backend=backend, **options), inputs, to),
        (partial(rms_norm, backend=backend), {"x": x, "weight": x[0]}, [x, x]),
    ):
        found = []
        for _ in range(2):
            leaves = {name: y if y is None else y.clone().requires_grad_() for name, y in given.items()}
            out = op(**leaves)
            found.append(torch.autograd.grad(out, [y for y in leaves.values() if y is not None], grad))
        assert all(map(torch.equal, *found))
