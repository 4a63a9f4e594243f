"""linear_logprob with three products or four: when, with how much memory, and what happens if grad_scale is wrong.

Products and tensors are counted in the functions of the back ends, below the registered ops, which hide their operations from
a dispatch mode.
"""

import gc
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quietstar_kernels import _dispatch, linear_logprob
from quietstar_kernels._options import Head, Saved
from quietstar_kernels.testing import forward_backward, logprob_inputs

R, D, V = 48, 16, 640
PRODUCTS = {"aten::mm", "aten::addmm_", "aten::addmm"}


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in PRODUCTS:
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def inputs(device):
    return logprob_inputs(torch.Generator().manual_seed(0), R, D, V, device=device)


def leaves(inputs):
    """hidden and weight, which require gradients, and the targets."""
    return [inputs[name].clone().requires_grad_() for name in ("hidden", "weight")] + [inputs["targets"]]


def saved_bytes(result):
    """Bytes that the op that made ``result`` has saved for its backward, besides its inputs."""
    return sum(x.nbytes for x in result.grad_fn.saved_tensors if isinstance(x, torch.Tensor) and not x.requires_grad)


@pytest.mark.parametrize("entropy", [True, False])
def test_products(backend, inputs, entropy):
    """One in the forward, and three or two in the backward; three in total if the gradient is known."""
    if backend == "reference":
        pytest.skip("it never keeps anything")
    functions = _dispatch.module("linear_logprob", backend)
    given = inputs["hidden"], Head(inputs["weight"], inputs["bias"], None, None, 1.0, []), inputs["targets"]
    grads = torch.ones(2, R, device=inputs["hidden"].device).unbind()
    grads = (grads[0], grads[1] if entropy else None)
    for keep, products in ((False, 3), (True, 2)):
        with Products() as forward:
            _, *saved = functions.linear_logprob(*given, entropy, keep)
        with Products() as backward:
            functions.linear_logprob_backward(*grads, *given, Saved(*saved), [True] * 3)
        assert (forward.count, backward.count) == (R * D * V, products * R * D * V)
    with Products() as joined:
        functions.linear_logprob_joined(*grads, *given, [True] * 3, 0)
    assert joined.count == 3 * R * D * V


def test_what_is_kept(backend, inputs, monkeypatch):
    """All logits if they fit; none if one byte is missing, or nothing requires a gradient. The backward frees them."""
    if backend == "reference":
        pytest.skip("it never keeps anything")
    hidden, weight, targets = leaves(inputs)
    op = partial(linear_logprob, hidden, weight, targets, backend=backend)
    few = 16 * R * 4
    kept, not_kept = op(keep_bytes=4 * R * V), op(keep_bytes=4 * R * V - 1)
    assert saved_bytes(kept) >= 4 * R * V and saved_bytes(not_kept) <= few
    assert torch.equal(kept, not_kept)
    storages = [StorageWeakRef(x.untyped_storage()) for x in kept.grad_fn.saved_tensors if x is not None and x.numel() >= R * V]
    kept.sum().backward()
    if backend == "triton":
        gc.collect()  # its interpreter leaves cycles
    assert len(storages) == 1 and storages[0].expired()
    with pytest.raises(RuntimeError, match="freed"):
        kept.grad_fn.saved_tensors  # noqa: B018
    promised = torch.ones(R, device=targets.device)
    known = op(grad_scale=promised)
    assert torch.equal(known, kept) and saved_bytes(known) <= few + hidden.nbytes + weight.nbytes

    functions, asked = _dispatch.module("linear_logprob", backend), []
    forward = functions.linear_logprob
    monkeypatch.setattr(functions, "linear_logprob", lambda *x: (asked.append(x[-1]), forward(*x))[1])
    with torch.no_grad():
        assert torch.equal(op(), kept) and torch.equal(op(grad_scale=promised), kept)
    linear_logprob(hidden.detach(), weight.detach(), targets, backend=backend)
    assert asked == [False] * 3
    checkpoint(op, use_reentrant=False).sum().backward()
    assert asked[3:] == [True] * 2


def test_backward_twice(backend, inputs):
    """The backward does not overwrite what is kept."""
    for options in ({}, {"grad_scale": torch.full((R,), 0.5, device=inputs["targets"].device)}):
        hidden, weight, targets = leaves(inputs)
        total = linear_logprob(hidden, weight, targets, backend=backend, **options).sum()
        once, twice = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_turns(backend, device):
    """More rows than may have logits at once, which are at least D, so the weight's gradient is summed over several turns."""
    inputs = logprob_inputs(torch.Generator().manual_seed(0), 50, 4, 333, bias=True, device=device)
    grads = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)).to(device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    results, want = forward_backward(op, inputs, tuple(grads))
    for keep_bytes in (0, 9 * 384 * 4, 2**28):
        known = partial(op, grad_scale=grads, keep_bytes=keep_bytes)
        got, gradients = forward_backward(known, inputs, tuple(grads))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, results, strict=True))
        assert all(torch.allclose(gradients[name], want[name], atol=1e-5) for name in want), keep_bytes


@pytest.mark.parametrize("keep_bytes", [4 * R * V, 4 * R * V - 1])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_a_compiler_does_not_know(backend, inputs, keep_bytes):
    """A mask selects them. Logits are kept if those of all rows would be."""

    def loss(hidden, weight, targets):
        chosen = targets != -100
        return linear_logprob(hidden[chosen], weight, targets[chosen], keep_bytes=keep_bytes, backend=backend).sum()

    torch.compiler.reset()
    want, got = (
        forward_backward(
            f,
            {name: inputs[name] for name in ("hidden", "weight", "targets")},
            (torch.ones((), device=inputs["targets"].device),),
        )
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    )
    assert torch.allclose(want[0][0], got[0][0])
    assert all(torch.allclose(want[1][name], got[1][name], atol=1e-6) for name in want[1])


@pytest.mark.parametrize("entropy", [True, False])
def test_a_common_factor_is_allowed(backend, inputs, entropy):
    """Of any size and sign, and 0; and any gradient of rows whose target is -100."""
    device = inputs["targets"].device
    ignored = inputs["targets"] == -100
    promised = torch.randn(1 + entropy, R, generator=torch.Generator().manual_seed(1)).to(device)
    known = promised.clone()
    known[0, ignored] = torch.nan
    op = partial(linear_logprob, return_entropy=entropy, backend=backend)
    for factor in (1.0, -3.7e-6, 65536.0, 0.0):
        came = factor * promised
        came[0, ignored] = 7.0
        _, want = forward_backward(op, inputs, tuple(came))
        _, got = forward_backward(partial(op, grad_scale=known if entropy else known[0]), inputs, tuple(came))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6 * abs(factor))
    nothing = torch.zeros_like(known if entropy else known[0])
    _, got = forward_backward(partial(op, grad_scale=nothing), inputs, tuple(torch.zeros_like(promised)))
    assert all((x == 0).all() for x in got.values())


@pytest.mark.parametrize("place", [(0, 0), (0, 5), (1, 5)])
def test_a_wrong_promise_is_an_error(backend, inputs, place):
    """One row is off by a thousandth, or has a gradient although none was promised: an error on CPU, NaN on a GPU."""
    device = inputs["targets"].device
    inputs["targets"][:6] = 1
    for promised in (torch.ones(2, R, device=device), torch.zeros(2, R, device=device)):
        came = promised.clone()
        came[place] += 1e-3
        op = partial(linear_logprob, return_entropy=True, grad_scale=promised, backend=backend)
        if device.type == "cpu":
            with pytest.raises(ValueError, match="^linear_logprob: grad_scale must be the gradient that comes back"):
                forward_backward(op, inputs, tuple(came))
        else:
            _, got = forward_backward(op, inputs, tuple(came))
            assert got["hidden"].isnan().all() and got["weight"].isnan().all()


@pytest.mark.parametrize("overflow", [torch.inf, torch.nan])
def test_a_gradient_that_overflows_is_no_broken_promise(backend, inputs, overflow):
    """It makes all gradients NaN, so that a loss scaler skips the step."""
    promised = torch.ones(R, device=inputs["targets"].device)
    op = partial(linear_logprob, grad_scale=promised, backend=backend)
    _, got = forward_backward(op, inputs, (overflow * promised,))
    assert got["hidden"].isnan().all() and got["weight"].isnan().all()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"grad_scale": torch.ones(3)}, "grad_scale must have shape"),
        ({"grad_scale": torch.ones(R), "return_entropy": True}, "grad_scale must have shape"),
        ({"grad_scale": torch.ones(R).half()}, "grad_scale must have dtype float32"),
        ({"keep_bytes": -1}, "keep_bytes must be an integer of at least 0, got -1"),
        ({"keep_bytes": 1e9}, "keep_bytes must be an integer of at least 0, got 1000000000.0"),
    ],
)
def test_bad_input(wrong, said):
    inputs = logprob_inputs(torch.Generator().manual_seed(0), R, D, V)
    with pytest.raises(ValueError, match=f"^linear_logprob: {said}"):
        linear_logprob(**inputs, **wrong)
