"""linear_logprob: error rule, gradcheck, opcheck, compile, targets that don't count, chunks, one compile for all sizes."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from quietstar_kernels import _dispatch, linear_logprob
from quietstar_kernels.linear_logprob import _backward, _forward
from quietstar_kernels.testing import assert_op_close_as_plain, forward_backward, logprob_inputs, plain_logprob

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"banned": (3, 7, 11)},
    {"softcap": 4.0},
    {"scale": 0.5, "softcap": 3.0, "temperature": 2.0, "banned": (0, 5)},
]
SHAPES = [(1, 1, 20), (5, 3, 128), (40, 8, 333), (67, 17, 129), (200, 5, 1100)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make(seed, shape, device, dtype=torch.float32, bias=True, **options):
    banned = options.get("banned", ())
    inputs = logprob_inputs(seeded(seed), *shape, bias=bias, banned=banned, dtype=dtype, device=device)
    grads = torch.randn(2, shape[0], generator=seeded(seed + 1), dtype=torch.float64)
    return inputs, tuple(grads.to(device, torch.float32))


def small_chunks(monkeypatch, backend):
    """Chunks of 2^12 logits; those of Triton are 128 ids wide at least."""
    monkeypatch.setattr("quietstar_kernels.cpu._head.LOGITS", 2**12)
    if backend == "triton":
        module = _dispatch.module("linear_logprob", backend)
        monkeypatch.setattr(module, "LOGITS", 2**12)
        monkeypatch.setattr(module, "COLUMNS", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_error_rule(backend, device, interpreted, options, shape, dtype):
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    for seed in range(1 if interpreted and shape[0] > 50 else 2):
        inputs, grads = make(seed, shape, device, dtype, bias=seed % 2 == 0, **options)
        op = partial(linear_logprob, return_entropy=True, backend=backend)
        assert_op_close_as_plain(op, plain_logprob, inputs, grads, f"seed {seed}", **options)
        alone = lambda **x: plain_logprob(**x)[0]  # noqa: E731
        op = partial(linear_logprob, backend=backend)
        assert_op_close_as_plain(op, alone, inputs, grads[:1], f"seed {seed} without entropy", **options)


@pytest.mark.filterwarnings("ignore:invalid value")  # from the interpreter: -inf of the padding times a scale of 0
@pytest.mark.parametrize("scale", [30.0, -30.0, 0.0])
def test_large_and_equal_logits(backend, device, scale):
    """Rows that are all but certain, of either sign, and rows in which every id is as likely."""
    inputs, grads = make(0, (40, 8, 333), device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, f"scale {scale}", scale=scale)


def test_a_large_vocabulary(backend, device, interpreted):
    """More rows of it than one buffer of logits takes, on any back end that has a fixed one."""
    if interpreted:
        pytest.skip("takes minutes; test_many_chunks has smaller chunks instead")
    inputs, grads = make(0, (150 if device.type == "cuda" else 34, 4, 130_001), device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "large vocabulary", softcap=20.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[-1:], ids=str)
def test_many_chunks(backend, device, monkeypatch, options, dtype):
    """Chunks of rows and of the vocabulary, the last of each narrower."""
    small_chunks(monkeypatch, backend)
    inputs, grads = make(0, (100, 4, 700), device, dtype, **options)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "many chunks", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("entropy", [True, False])
def test_gradcheck(backend, device, options, entropy):
    if backend == "triton":
        pytest.skip("it does not compute in fp64")
    inputs, _ = make(0, (4, 3, 15), device, torch.float64, **options)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    op = lambda hidden, weight, bias: linear_logprob(  # noqa: E731
        hidden, weight, inputs["targets"], bias, return_entropy=entropy, backend=backend, **options
    )
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[-1:], ids=str)
def test_opcheck(backend, device, entropy, options):
    inputs, grads = make(0, (5, 3, 20), device, bias=bool(options), **options)
    hidden, weight, bias, targets = inputs.values()
    rest = options.get("scale"), options.get("softcap"), options.get("temperature", 1.0), list(options.get("banned", ()))
    _, *saved = _forward(hidden, weight, targets, bias, *rest, True, backend)
    head = (hidden, weight, targets, bias, *saved, *rest)
    for wanted in ([True, True, bias is not None], [True, False, False]):
        torch.library.opcheck(_backward, (grads[0], grads[1] if entropy else None, *head, wanted, backend))
    leaves = [x if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(_forward, (*leaves[:2], targets, leaves[2], *rest, entropy, backend))


@pytest.mark.parametrize("entropy", [True, False])
def test_compiles_without_a_graph_break(backend, device, entropy):
    inputs, grads = make(0, (5, 3, 20), device, banned=(3,))

    def loss(hidden, weight, bias, targets):
        result = linear_logprob(
            hidden, weight, targets, bias, softcap=5.0, banned=(3,), return_entropy=entropy, backend=backend
        )
        return 2 * result[0] + result[1] if entropy else 2 * result

    eager = forward_backward(loss, inputs, grads[:1])
    compiled = forward_backward(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs, grads[:1])
    assert torch.equal(eager[0][0], compiled[0][0])
    assert all(torch.equal(eager[1][name], compiled[1][name]) for name in eager[1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_does_not_count(backend, device, options):
    """-100 gives 0 and no gradient, whatever gradient comes in; a banned id gets no gradient; two runs agree bitwise."""
    inputs, grads = make(0, (40, 8, 333), device, **options)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    (logprob, entropy), got = forward_backward(op, inputs, grads[:1], **options)
    (again, entropy_again), got_again = forward_backward(op, inputs, grads[:1], **options)
    ignored = inputs["targets"] == -100
    assert ignored.any() and (logprob[ignored] == 0).all() and (logprob[~ignored] < 0).all()
    assert (got["hidden"][ignored] == 0).all() and (entropy > 0).all()
    banned = list(options.get("banned", ()))
    assert (got["weight"][banned] == 0).all() and (got["bias"][banned] == 0).all()
    assert torch.equal(logprob, again) and torch.equal(entropy, entropy_again)
    assert all(torch.equal(got[name], got_again[name]) for name in got)
    poisoned = (grads[0].masked_fill(ignored, torch.nan),)
    _, got_poisoned = forward_backward(op, inputs, poisoned, **options)
    assert all(torch.equal(got[name], got_poisoned[name]) for name in got)


def test_a_banned_target(backend, device):
    """The public function refuses it on a CPU. Below, the log-probability is -inf, and the normaliser is differentiated."""
    inputs, grads = make(0, (5, 3, 20), device)
    hidden, weight, bias, _ = inputs.values()
    targets = torch.full((5,), 3, device=device)
    head, rest = (hidden, weight, targets, bias), (None, None, 0.7, [3])
    logprob, *saved = _forward(*head, *rest, True, backend)
    assert (logprob == -torch.inf).all() and all(x.isfinite().all() for x in saved)
    got = _backward(grads[0], None, *head, *saved, *rest, [True] * 3, backend)
    allowed = [3 != i for i in range(20)]
    p = torch.softmax(((hidden @ weight.T + bias) / 0.7)[:, allowed].double(), -1)
    d = torch.zeros(5, 20, dtype=torch.float64, device=device)
    d[:, allowed] = -grads[0][:, None].double() * p / 0.7
    for grad, want in zip(got, (d @ weight.double(), d.T @ hidden.double(), d.sum(0)), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-5)


def test_gradients_are_optional(backend, device):
    """A frozen weight, and hidden states without a gradient: what isn't wanted isn't computed either."""
    inputs, grads = make(0, (5, 3, 20), device)
    _, want = forward_backward(partial(linear_logprob, backend=backend), inputs, grads[:1])
    hidden, weight, bias, targets = inputs.values()
    rest = (None, None, 1.0, [])
    functions = _dispatch.module("linear_logprob", backend)
    _, *saved = functions.linear_logprob(hidden, weight, targets, bias, *rest, False)
    for i, name in enumerate(("hidden", "weight", "bias")):
        leaf = inputs[name].detach().requires_grad_()
        logprob = linear_logprob(**(inputs | {name: leaf}), backend=backend)
        logprob.backward(grads[0])
        assert torch.equal(leaf.grad, want[name]), name
        wanted = [i == j for j in range(3)]
        got = functions.linear_logprob_backward(grads[0], None, hidden, weight, targets, bias, *saved, *rest, wanted)
        assert [x is not None for x in got] == wanted


@pytest.mark.parametrize("shape", [(0, 3, 20), (1, 1, 1)], ids=str)
def test_edges(backend, device, shape):
    inputs, grads = make(0, shape, device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, str(shape))


def test_strided(backend, device):
    inputs, grads = make(0, (40, 8, 333), device)
    wide = {name: torch.cat([inputs[name]] * 2, 1)[:, 8:] for name in ("hidden", "weight")}
    inputs |= {"hidden": wide["hidden"].T.contiguous().T, "weight": wide["weight"]}
    inputs |= {name: inputs[name].repeat_interleave(2)[::2] for name in ("targets", "bias")}
    assert not any(x.is_contiguous() for x in inputs.values())
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "strided")


def test_expanded_gradients(backend, device):
    """``sum`` sends back one number with a stride of 0."""
    inputs, _ = make(0, (40, 8, 333), device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    _, want = forward_backward(op, inputs, tuple(torch.ones(2, 40, device=device)))
    leaf = inputs["hidden"].detach().requires_grad_()
    logprob, entropy = op(**(inputs | {"hidden": leaf}))
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal(leaf.grad, want["hidden"])


@pytest.mark.slow
def test_one_compile_serves_all_sizes():
    """The cases that are compiled ahead of time have several sizes under each label, one row and one id among them."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_op.py"), "linear_logprob", "sm_90"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    compiled = Counter((row["kernel"], row["label"]) for row in rows)
    assert {kernel for kernel, _ in compiled} == {"_online_softmax", "_logits_gradient"} and set(compiled.values()) == {1}
