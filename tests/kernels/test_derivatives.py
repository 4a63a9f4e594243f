"""Derivatives by every way that PyTorch has: right, or an error that says what has them. None is silently zero."""

import itertools
from functools import partial

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar_kernels import (
    ThoughtLayout,
    gated_activation,
    linear_logprob,
    rms_norm,
    rotary,
    rotary_decode,
    sample_token,
    thought_attention,
    thought_decode,
)
from quietstar_kernels.testing import (
    attention_inputs,
    decode_inputs,
    logprob_inputs,
    plain_attention,
    plain_gated,
    plain_logprob,
    plain_norm,
    plain_rotary,
    sample_inputs,
)

LAYOUT = ThoughtLayout.every_position(1, 2, 1, 2)
SMALL = {"heads": 2, "groups": 1, "width": 2, "dtype": torch.float64}
ATTENTION = attention_inputs(torch.Generator().manual_seed(0), LAYOUT, **SMALL)
DECODE = decode_inputs(torch.Generator().manual_seed(0), LAYOUT, **SMALL)
HEAD = logprob_inputs(torch.Generator().manual_seed(0), 4, 2, 20, dtype=torch.float64)
SAMPLE = sample_inputs(torch.Generator().manual_seed(0), 4, 2, 20, dtype=torch.float64)
Q, HIDDEN = ATTENTION["q"], HEAD["hidden"]
X, ANGLES = (
    torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) for shape in ((2, 16), (2, 1, 2, 4))
)


def attention(x):
    return thought_attention(**(ATTENTION | {"q": x}), layout=LAYOUT)


def logprob(x):
    return linear_logprob(**(HEAD | {"hidden": x}))


def lse(x):
    return thought_attention(**(ATTENTION | {"q": x}), layout=LAYOUT, return_lse=True)[1]


def norm(x, op=rms_norm):
    return op(x, x[0], delta=x.sin())[1]


def turned(x, op=rotary):
    return torch.cat(op(x[None], None, None, *ANGLES, (2, 1), x[0, :4]), 1)


def turned_step(x):
    own = x.new_zeros(2, 1, 1, 2, 3, 4)
    return rotary_decode(x[None], None, None, *ANGLES, (2, 1), *own, 1)


def decode(x):
    return thought_decode(**(DECODE | {"q": x}), layout=LAYOUT, step=1)


def sampled(x):
    return sample_token(**(SAMPLE | {"hidden": x}), seed=0)[1]


PLAIN = {
    attention: (Q, lambda x: plain_attention(**(ATTENTION | {"q": x}), layout=LAYOUT)[0]),
    lse: (Q, lambda x: plain_attention(**(ATTENTION | {"q": x}), layout=LAYOUT)[1]),
    logprob: (HIDDEN, lambda x: plain_logprob(**(HEAD | {"hidden": x}))[0]),
    norm: (X, partial(norm, op=plain_norm)),
    turned: (X, partial(turned, op=plain_rotary)),
    gated_activation: (X, plain_gated),
}
INSTEAD = {attention: ("thought_attention", "plain_attention"), logprob: ("linear_logprob", "plain_logprob")}
INSTEAD |= {norm: ("rms_norm", "plain_norm"), turned: ("rotary", "plain_rotary")}
INSTEAD |= {lse: INSTEAD[attention], gated_activation: ("gated_activation", "plain_gated")}
NO_DERIVATIVE = {decode: (DECODE["q"], "thought_decode has no "), sampled: (HIDDEN, "sample_token has no ")}
NO_DERIVATIVE |= {turned_step: (X, "rotary_decode has no ")}


def two(x):
    return torch.stack([x, 2 * x])


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def loss(f):
    return lambda x: f(x).square().sum()


def second(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


REVERSE = {
    "grad": lambda f, x: func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "grad of vmap": lambda f, x: func.grad(lambda x: func.vmap(f)(x).sum())(two(x)),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: f(x).sum()))(two(x)),
    "create_graph": lambda f, x: torch.autograd.functional.vjp(lambda x: f(x).sum(), x, create_graph=True)[1],
}
JACOBIANS = {
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "jacrev in chunks": lambda f, x: func.jacrev(f, chunk_size=1)(x),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}
FORWARD = {
    "dual": dual,
    "dual without gradients": torch.no_grad()(dual),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "jvp without gradients": torch.no_grad()(lambda f, x: func.jvp(f, (x,), (x.cos(),))[1]),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "jvp of vmap": lambda f, x: func.jvp(func.vmap(f), (two(x),), (two(x),))[1],
    "linearize": lambda f, x: func.linearize(f, x)[1](x.cos()),
    "hessian": lambda f, x: func.hessian(loss(f))(x),
}
SECOND = {
    "create_graph": second,
    "grad of grad": lambda f, x: func.grad(lambda x: func.grad(loss(f))(x).square().sum())(x),
    "hvp": lambda f, x: torch.autograd.functional.hvp(loss(f), x, x.cos())[1],
}


def name(value):
    return getattr(value, "__name__", str(value))


def cases(ways, functions):
    return pytest.mark.parametrize("way, f", [(way, f) for way in ways for f in functions], ids=name)


@cases(REVERSE, PLAIN)
def test_reverse(way, f):
    x, plain = PLAIN[f]
    torch.testing.assert_close(REVERSE[way](f, x), REVERSE[way](plain, x))


@cases(JACOBIANS, PLAIN)
def test_jacobian(way, f):
    x, plain = PLAIN[f]
    torch.testing.assert_close(JACOBIANS[way](f, x), JACOBIANS[way](plain, x))


@cases(FORWARD, PLAIN)
def test_forward_mode_is_refused(way, f):
    op, plain = INSTEAD[f]
    message = f"^{op} has no forward-mode derivative: quietstar_kernels.testing.{plain} has all(, in dense PyTorch)?$"
    with pytest.raises(NotImplementedError, match=message):
        FORWARD[way](f, PLAIN[f][0])


@cases(SECOND, PLAIN)
def test_second_derivatives_are_refused(way, f):
    with pytest.raises(NotImplementedError, match=f"^{INSTEAD[f][0]} has no second derivative: quietstar_ker"):
        SECOND[way](f, PLAIN[f][0])


@cases(REVERSE | FORWARD | SECOND, NO_DERIVATIVE)
def test_ops_without_a_derivative(way, f):
    x, message = NO_DERIVATIVE[f]
    with pytest.raises(NotImplementedError, match=f"^{message}(forward-mode )?derivative: .* in reverse mode$"):
        (REVERSE | FORWARD | SECOND)[way](f, x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("f", PLAIN | NO_DERIVATIVE, ids=name)
def test_vmap(f, grad):
    x = (NO_DERIVATIVE | PLAIN)[f][0]
    with torch.set_grad_enabled(grad):
        got = func.vmap(f)(two(x))
    assert torch.equal(got, torch.stack([f(x), f(2 * x)]))


def test_vmap_over_targets():
    """They are checked for all calls at once."""
    run = lambda targets: linear_logprob(**(HEAD | {"targets": targets}))  # noqa: E731
    targets = torch.tensor([[0, 3, -100, 19], [7, 7, 8, -100]])
    assert torch.equal(func.vmap(run)(targets), torch.stack([run(x) for x in targets]))
    with pytest.raises(ValueError, match="^linear_logprob: targets must be from 0 to V-1=19 or -100, got 20"):
        func.vmap(run)(targets.clamp(min=0) + 1)


@pytest.mark.kernels
@pytest.mark.parametrize("f", [attention, logprob], ids=name)
def test_compiled(f):
    x, plain = PLAIN[f]
    run = lambda way: torch.compile(lambda x: way(f, x), backend="aot_eager")(x)  # noqa: E731
    torch.testing.assert_close(run(REVERSE["grad"]), REVERSE["grad"](plain, x))
    with pytest.raises(Exception, match="has no forward-mode derivative"):
        run(FORWARD["jvp"])


class OurCalls(TorchDispatchMode):
    """Collects the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "quietstar":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def permuted(x, order):
    """The same numbers, with the dimensions of a matrix or those before the last in another order in memory."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2:
        return x
    order = [1, 0] if x.dim() == 2 else [*order[: x.dim() - 1], x.dim() - 1]
    return x.permute(order).contiguous().permute(*torch.tensor(order).argsort().tolist()).detach()


@pytest.mark.parametrize("on", ["cpu", "reference"])
def test_strides_are_those_of_fake_tensors(on):
    """Whatever the strides of the inputs: code that Inductor compiles relies on it."""
    ops = {
        partial(thought_attention, layout=LAYOUT, return_lse=True): ATTENTION,
        partial(thought_decode, layout=LAYOUT, step=1): DECODE,
        partial(linear_logprob, return_entropy=True): HEAD,
        partial(linear_logprob, return_entropy=True, keep_bytes=0): HEAD,
        partial(sample_token, seed=0): SAMPLE,
    }
    found = set()
    for op, inputs in ops.items():
        for dtype, order in itertools.product((torch.float64, torch.float32), ([1, 0, 2, 3], [2, 1, 0, 3], [0, 2, 1, 3])):
            given = {name: permuted(x, order) for name, x in inputs.items()}
            given = {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
            leaves = [x.requires_grad_() for x in given.values() if torch.is_tensor(x) and x.is_floating_point()]
            with OurCalls() as ours, torch.set_grad_enabled(op.func in (thought_attention, linear_logprob)):
                results = op(**given, backend=on)
                if torch.is_grad_enabled():
                    torch.autograd.grad([x.square().sum() for x in results], leaves)
            for called, args in ours.calls:
                torch.library.opcheck(called, args, test_utils="test_faketensor")
                found.add(called._opname)
    assert len(found) == 6
