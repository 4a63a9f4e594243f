"""linear_logprob: error rule, gradcheck, opcheck, compile, targets that don't count, chunks, one compile for all sizes."""

import math
from functools import partial

import pytest
import torch

from quietstar_kernels import _dispatch, linear_logprob
from quietstar_kernels._options import Head, Saved
from quietstar_kernels.linear_logprob import _backward, _forward
from quietstar_kernels.testing import assert_op_close_as_plain, forward_backward, logprob_inputs, plain_logprob
from tests.kernels.drawn import seeded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"banned": (3, 7, 11)},
    {"softcap": 4.0},
    {"scale": 0.5, "softcap": 3.0, "temperature": 2.0, "banned": (0, 5)},
]
SHAPES = [(67, 17, 129), (1, 1, 20), (5, 3, 128), (40, 8, 333), (200, 5, 1100)]
WAYS = ["kept", "again"]  # logits are kept for the backward, or computed again
ERROR_CASES = [(options, way, SHAPES[0], dtype) for options in OPTIONS for way in WAYS for dtype in DTYPES]
ERROR_CASES += [(options, "kept", shape, torch.float32) for options in (OPTIONS[0], OPTIONS[-1]) for shape in SHAPES[1:]]


def in_way(way, backend, **options):
    return partial(linear_logprob, backend=backend, keep_bytes=2**28 if way == "kept" else 0, **options)


def make(seed, shape, device, dtype=torch.float32, bias=True, **options):
    banned = options.get("banned", ())
    inputs = logprob_inputs(seeded(seed), *shape, bias=bias, banned=banned, dtype=dtype, device=device)
    grads = torch.randn(2, shape[0], generator=seeded(seed + 1), dtype=torch.float64)
    return inputs, tuple(grads.to(device, torch.float32))


def small_chunks(monkeypatch, backend):
    """Chunks of 2^12 logits, in Triton at least 256 ids wide."""
    monkeypatch.setattr("quietstar_kernels.cpu._head.MOST", 2**12)
    if backend == "triton":
        module = _dispatch.module("linear_logprob", backend)
        monkeypatch.setattr(module, "LOGITS", 2**12)
        monkeypatch.setattr(module, "COLUMNS", 256)


@pytest.mark.parametrize("options, way, shape, dtype", ERROR_CASES, ids=str)
def test_error_rule(backend, device, interpreted, way, options, shape, dtype):
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    if backend == "reference" and way == "again":
        pytest.skip("it never keeps anything")
    for seed in range(1 if interpreted and shape[0] > 50 else 2):
        inputs, grads = make(seed, shape, device, dtype, bias=seed % 2 == 0, **options)
        terms = {"hidden": float(grads[0].abs().max() * inputs["weight"].abs().max())}  # of a row's gradient, which may cancel
        op = in_way(way, backend, return_entropy=True)
        assert_op_close_as_plain(op, plain_logprob, inputs, grads, f"seed {seed}", terms, **options)
        alone = lambda **x: plain_logprob(**x)[0]  # noqa: E731
        op = in_way(way, backend)
        assert_op_close_as_plain(op, alone, inputs, grads[:1], f"seed {seed} without entropy", terms, **options)


@pytest.mark.filterwarnings("ignore:invalid value")  # by the interpreter: -inf of the padding times a scale of 0
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [30.0, -30.0, 0.0])
@pytest.mark.parametrize("way", WAYS)
def test_large_and_equal_logits(backend, device, interpreted, way, scale, dtype):
    """Rows that are almost certain, of either sign, and rows in which all ids are equally likely."""
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    inputs, grads = make(0, (40, 8, 333), device, dtype)
    op = in_way(way, backend, return_entropy=True)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, f"scale {scale}", scale=scale)


def test_a_large_vocabulary(backend, device, interpreted):
    """More rows than a buffer of logits holds, on all back ends with a fixed buffer."""
    if interpreted:
        pytest.skip("takes minutes; test_many_chunks has smaller chunks instead")
    inputs, grads = make(0, (150 if device.type == "cuda" else 34, 4, 130_001), device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "large vocabulary", softcap=20.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[-1:], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_many_chunks(backend, device, monkeypatch, way, options, dtype):
    """Chunks of rows and of the vocabulary, the last of each narrower."""
    small_chunks(monkeypatch, backend)
    inputs, grads = make(0, (100, 4, 700), device, dtype, **options)
    op = in_way(way, backend, return_entropy=True)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "many chunks", **options)


@pytest.mark.parametrize("entropy, options", [(True, options) for options in OPTIONS] + [(False, OPTIONS[-1])], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_gradcheck(backend, device, way, options, entropy):
    if backend == "triton":
        pytest.skip("it does not compute in fp64")
    inputs, _ = make(0, (4, 3, 15), device, torch.float64, **options)
    op = in_way(way, backend, return_entropy=entropy, **options)

    def results(hidden, weight, bias):
        return op(hidden, weight, inputs["targets"], bias)

    assert torch.autograd.gradcheck(results, [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")])


@pytest.mark.kernels
@pytest.mark.parametrize("entropy, options", [(False, OPTIONS[0]), (True, OPTIONS[-1])], ids=str)
def test_opcheck(backend, device, entropy, options):
    inputs, grads = make(0, (5, 3, 20), device, bias=bool(options), **options)
    hidden, weight, bias, targets = inputs.values()
    leaves = [x if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    head, leaves = (hidden, weight, targets, bias), (*leaves[:2], targets, leaves[2])
    rest = options.get("scale"), options.get("softcap"), options.get("temperature", 1.0), list(options.get("banned", ()))
    ways = ([True, True, bias is not None], [True, False, False])
    for keep in (False,) if backend == "reference" else (False, True):
        _, *saved = _forward(*head, *rest, True, keep, backend)
        saved = (*head, *saved[:3], *(saved[3:] if keep else (None, None)), *rest)
        for wanted in ways:
            torch.library.opcheck(_backward, (grads[0], grads[1] if entropy else None, *saved, wanted, backend))
        torch.library.opcheck(_forward, (*leaves, *rest, entropy, keep, backend))


@pytest.mark.parametrize("way, entropy", [("kept", True), ("again", False)])
def test_compiles_without_a_graph_break(backend, device, way, entropy):
    torch.compiler.reset()  # the same function is compiled for every back end
    inputs, grads = make(0, (5, 3, 20), device, banned=(3,))
    op = in_way(way, backend, softcap=5.0, banned=(3,), return_entropy=entropy)

    def loss(hidden, weight, bias, targets):
        result = op(hidden, weight, targets, bias)
        return 2 * result[0] + result[1] if entropy else 2 * result

    eager = forward_backward(loss, inputs, grads[:1])
    compiled = forward_backward(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs, grads[:1])
    assert torch.equal(eager[0][0], compiled[0][0])
    assert all(torch.equal(eager[1][name], compiled[1][name]) for name in eager[1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_does_not_count(backend, device, options):
    """-100 gives 0 and no gradient, whatever the gradient of the output; banned ids get none; two runs agree bitwise."""
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
    """The public function refuses it on a CPU. The op gives -inf, and differentiates the normaliser."""
    inputs, grads = make(0, (5, 3, 20), device)
    hidden, weight, bias, _ = inputs.values()
    targets = torch.full((5,), 3, device=device)
    head, rest = (hidden, weight, targets, bias), (None, None, 0.7, [3])
    logprob, *saved = _forward(*head, *rest, True, False, backend)
    assert (logprob == -torch.inf).all() and all(x.isfinite().all() for x in saved)
    got = [_backward(grads[0], None, *head, *saved[:3], None, None, *rest, [True] * 3, backend)]
    if backend != "reference":
        _, *saved = _forward(*head, *rest, True, True, backend)
        got += [_backward(grads[0], None, *head, *saved, *rest, [True] * 3, backend)]
    allowed = [3 != i for i in range(20)]
    p = torch.softmax(((hidden @ weight.T + bias) / 0.7)[:, allowed].double(), -1)
    d = torch.zeros(5, 20, dtype=torch.float64, device=device)
    d[:, allowed] = -grads[0][:, None].double() * p / 0.7
    want = (d @ weight.double(), d.T @ hidden.double(), d.sum(0))
    for gradients in got:
        for grad, truth in zip(gradients, want, strict=True):
            torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_optional(backend, device, way):
    """A frozen weight, and hidden states without a gradient: what isn't wanted isn't computed either."""
    inputs, grads = make(0, (5, 3, 20), device)
    op = in_way(way, backend)
    _, want = forward_backward(op, inputs, grads[:1])
    given = inputs["hidden"], Head(inputs["weight"], inputs["bias"], None, None, 1.0, []), inputs["targets"]
    functions = _dispatch.module("linear_logprob", backend)
    _, *saved = functions.linear_logprob(*given, False, way == "kept")
    for i, name in enumerate(("hidden", "weight", "bias")):
        leaf = inputs[name].detach().requires_grad_()
        op(**(inputs | {name: leaf})).backward(grads[0])
        assert torch.equal(leaf.grad, want[name]), name
        wanted = [i == j for j in range(3)]
        got = functions.linear_logprob_backward(grads[0], None, *given, Saved(*saved), wanted)
        assert [x is not None for x in got] == wanted


@pytest.mark.parametrize("shape", [(0, 3, 20), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_edges(backend, device, way, shape):
    inputs, grads = make(0, shape, device)
    op = in_way(way, backend, return_entropy=True)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, str(shape))


@pytest.mark.parametrize("way", WAYS)
def test_strided(backend, device, way):
    inputs, grads = make(0, (40, 8, 333), device)
    wide = {name: torch.cat([inputs[name]] * 2, 1)[:, 8:] for name in ("hidden", "weight")}
    inputs |= {"hidden": wide["hidden"].T.contiguous().T, "weight": wide["weight"]}
    inputs |= {name: inputs[name].repeat_interleave(2)[::2] for name in ("targets", "bias")}
    assert not any(x.is_contiguous() for x in inputs.values())
    op = in_way(way, backend, return_entropy=True)
    assert_op_close_as_plain(op, plain_logprob, inputs, grads, "strided")


def test_expanded_gradients(backend, device):
    """The gradient of ``sum`` is one number with a stride of 0."""
    inputs, _ = make(0, (40, 8, 333), device)
    op = partial(linear_logprob, return_entropy=True, backend=backend)
    _, want = forward_backward(op, inputs, tuple(torch.ones(2, 40, device=device)))
    leaf = inputs["hidden"].detach().requires_grad_()
    logprob, entropy = op(**(inputs | {"hidden": leaf}))
    (logprob.sum() + entropy.sum()).backward()
    assert torch.equal(leaf.grad, want["hidden"])


NOT_FINITE = {  # (what, row or id, to what) is set: the rows whose results are then NaN
    "NaN state": ("hidden", 1, math.nan, [1]),
    "infinite state": ("hidden", 1, math.inf, [1]),
    "NaN weight": ("weight", 30, math.nan, [0, 1, 2, 3]),
    "infinite weight": ("weight", 30, math.inf, [0, 1, 2, 3]),
    "infinite bias": ("bias", 30, math.inf, [0, 1, 2, 3]),
    "NaN bias, banned id": ("bias", 7, math.nan, []),
    "a bias of -inf": ("bias", 30, -math.inf, []),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_logits_that_are_not_finite(backend, device, case):
    name, place, value, rows = NOT_FINITE[case]
    inputs = logprob_inputs(torch.Generator().manual_seed(0), 4, 8, 50, bias=True, banned=(7,), device=device)
    inputs["targets"] = torch.tensor([0, 1, 2, -100], device=device)
    inputs[name][place] = value
    logprob, entropy = linear_logprob(**inputs, banned=(7,), return_entropy=True, backend=backend)
    assert entropy.isnan().nonzero().flatten().tolist() == rows
    assert logprob.isnan().nonzero().flatten().tolist() == [row for row in rows if row < 3] and logprob[3] == 0
