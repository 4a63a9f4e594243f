"""linear_logprob with three products or four: when, and with how much memory.

Products and tensors are counted in the functions of the back ends, below the registered ops, which hide their operations from
a dispatch mode.
"""

import gc
import importlib
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quietstar_kernels import _dispatch, linear_logprob
from quietstar_kernels._options import Head, Saved
from quietstar_kernels.linear_logprob import default_keep_bytes
from quietstar_kernels.testing import forward_backward, logprob_inputs

MODULE = importlib.import_module("quietstar_kernels.linear_logprob")  # not the function, which the package has by this name
R, D, V = 48, 16, 640
PRODUCTS = {"aten::mm": -2, "aten::addmm_": -2, "aten::addmm": -2, "mkldnn::_linear_pointwise": 0}  # the first factor


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in PRODUCTS:
            matrices = [x for x in args if isinstance(x, torch.Tensor)]  # not the dtype of the product
            first = PRODUCTS[function._schema.name] % len(matrices)
            a, b = matrices[first : first + 2]
            self.count += a.numel() * b.numel() // a.shape[1]
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
    """One in the forward, and three or two in the backward."""
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

    functions, asked = _dispatch.module("linear_logprob", backend), []
    forward = functions.linear_logprob
    monkeypatch.setattr(functions, "linear_logprob", lambda *x: (asked.append(x[-1]), forward(*x))[1])
    with torch.no_grad():
        assert torch.equal(op(), kept)
    linear_logprob(hidden.detach(), weight.detach(), targets, backend=backend)
    assert asked == [False] * 2
    checkpoint(op, use_reentrant=False).sum().backward()
    assert asked[2:] == [True] * 2


def test_backward_twice(backend, inputs):
    """The backward does not overwrite what is kept."""
    hidden, weight, targets = leaves(inputs)
    total = linear_logprob(hidden, weight, targets, backend=backend).sum()
    once, twice = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


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


@pytest.fixture
def asked(monkeypatch):
    """As if every GPU had 80 GiB; holds the devices that were asked."""
    devices = []
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: devices.append(device) or properties)
    MODULE._memory.cache_clear()
    yield devices
    MODULE._memory.cache_clear()


def test_what_a_device_keeps(asked):
    """Each GPU is asked once: that takes the host microseconds."""
    gpus = [torch.device("cuda", i) for i in (0, 1, 0)]
    assert [default_keep_bytes(gpu) for gpu in gpus] == [5 * 2**30] * 3 and asked == gpus[:2]
    assert [default_keep_bytes(torch.device(name)) for name in ("cpu", "meta")] == [2**28] * 2


def test_the_default_is_that_of_the_device(backend, inputs, monkeypatch):
    if backend == "reference":
        pytest.skip("it never keeps anything")
    hidden, weight, targets = leaves(inputs)
    for most, keeps in ((4 * R * V, True), (4 * R * V - 1, False)):
        monkeypatch.setattr(MODULE, "default_keep_bytes", {hidden.device: most}.get)
        assert (saved_bytes(linear_logprob(hidden, weight, targets, backend=backend)) >= 4 * R * V) is keeps


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_compiler_asks_a_device(asked, dynamic):
    """In one graph, without a warning, though it isn't told the number of rows."""

    def kept(x):
        return x * (2**27 * len(x) <= default_keep_bytes(torch.device("cuda", 0)))

    torch.compiler.reset()
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [compiled(torch.ones(rows)).sum() for rows in (30, 40, 41)] == [30, 40, 0]
    assert len(asked) == 1
