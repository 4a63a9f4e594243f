"""linear_logprob: error rule, gradcheck, opcheck, compile, targets that don't count, no tensor of R*V."""

from functools import partial

import pytest
import torch

from quietstar_kernels import linear_logprob
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


def make(seed, shape, dtype=torch.float32, bias=True, **options):
    inputs = logprob_inputs(seeded(seed), *shape, bias=bias, banned=options.get("banned", ()), dtype=dtype)
    grads = torch.randn(2, shape[0], generator=seeded(seed + 1), dtype=torch.float64)
    return inputs, tuple(grads.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_error_rule(backend, options, shape, dtype):
    for seed in range(2):
        inputs, grads = make(seed, shape, dtype, bias=seed % 2 == 0, **options)
        op = partial(linear_logprob, return_entropy=True, backend=backend)
        assert_op_close_as_plain(op, plain_logprob, inputs, grads, f"seed {seed}", **options)
        alone = lambda **x: plain_logprob(**x)[0]  # noqa: E731
        op = partial(linear_logprob, backend=backend)
        assert_op_close_as_plain(op, alone, inputs, grads[:1], f"seed {seed} without entropy", **options)


def test_a_large_vocabulary(backend):
    """34 rows of it fill more than one buffer of logits on any back end that has a fixed one."""
    inputs, grads = make(0, (34, 4, 130_001))
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "large vocabulary", softcap=20.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("entropy", [True, False])
def test_gradcheck(backend, options, entropy):
    inputs, _ = make(0, (4, 3, 15), torch.float64, **options)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    op = lambda hidden, weight, bias: linear_logprob(  # noqa: E731
        hidden, weight, inputs["targets"], bias, return_entropy=entropy, backend=backend, **options
    )
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[-1:], ids=str)
def test_opcheck(backend, options, entropy):
    inputs, grads = make(0, (5, 3, 20), bias=bool(options), **options)
    hidden, weight, bias, targets = inputs.values()
    banned = list(options.get("banned", ()))
    rest = (options.get("scale"), options.get("softcap"), options.get("temperature", 1.0), banned)
    grad_entropy = grads[1] if entropy else None
    torch.library.opcheck(_backward, (grads[0], grad_entropy, hidden, weight, targets, bias, *rest, backend))
    leaves = [x if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    torch.library.opcheck(_forward, (*leaves[:2], targets, leaves[2], *rest, entropy, backend))


@pytest.mark.parametrize("entropy", [True, False])
def test_compiles_without_a_graph_break(backend, entropy):
    inputs, grads = make(0, (5, 3, 20), banned=(3,))

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
def test_what_does_not_count(backend, options):
    """-100 gives 0 and no gradient, whatever gradient comes in; a banned id gets no gradient; two runs agree bitwise."""
    inputs, grads = make(0, (40, 8, 333), **options)
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


def test_gradients_are_optional(backend):
    """A frozen weight, and hidden states without a gradient."""
    inputs, grads = make(0, (5, 3, 20))
    _, want = forward_backward(partial(linear_logprob, backend=backend), inputs, grads[:1])
    for name in ("hidden", "weight", "bias"):
        leaf = inputs[name].detach().requires_grad_()
        logprob = linear_logprob(**(inputs | {name: leaf}), backend=backend)
        logprob.backward(grads[0])
        assert torch.equal(leaf.grad, want[name]), name


@pytest.mark.parametrize("shape", [(0, 3, 20), (1, 1, 1)], ids=str)
def test_edges(backend, shape):
    inputs, grads = make(0, shape)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, str(shape))


def test_strided(backend):
    inputs, grads = make(0, (40, 8, 333))
    wide = {name: torch.cat([inputs[name]] * 2, 1)[:, 8:] for name in ("hidden", "weight")}
    inputs |= {"hidden": wide["hidden"].T.contiguous().T, "weight": wide["weight"]}
    assert not inputs["hidden"].is_contiguous() and not inputs["weight"].is_contiguous()
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "strided")
