"""The cpu back end makes no tensor of R*V, (L+R)^2 or R*L, and Triton's linear_logprob none of R*V unless it keeps its logits.

The output of every operator is measured. The tests call the functions below the registered ops, which hide their operations
from a dispatch mode.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar_kernels import ThoughtLayout, _dispatch
from quietstar_kernels._options import AttentionOptions, Head, Saved
from quietstar_kernels.cpu import _library
from quietstar_kernels.testing import attention_inputs, decode_inputs, logprob_inputs, sample_inputs
from tests.kernels.drawn import seeded

R, V = 4096, 8192
SHARE = 8  # no tensor may reach this part of a dense implementation's


class LargestOutput(TorchDispatchMode):
    """Records the largest number of elements of an operator's output."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.fixture(params=["compiled", "in PyTorch"])
def way(request, monkeypatch):
    """How the CPU back end computes attention, decoding and sampling: without its library in the second case."""
    if request.param == "in PyTorch":
        monkeypatch.setattr(_library, "missing", lambda: "a test leaves it out")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sample_token(way, softcap, temperature):
    hidden, weight, bias, counters = sample_inputs(seeded(0), R, 4, V, bias=True).values()
    head = Head(weight, bias, None, softcap, temperature, [3])
    with LargestOutput() as largest:
        _dispatch.module("sample_token", "cpu").sample_token(hidden, head, counters, torch.tensor(0))
    assert V <= largest.numel <= R * V // SHARE


def largest_of_linear_logprob(functions, rows, vocabulary, softcap, entropy, keep, device="cpu"):
    """The largest outputs of the forward and of the backward."""
    inputs = logprob_inputs(seeded(0), rows, 4, vocabulary, bias=True, banned=(3,), device=device)
    given = inputs["hidden"], Head(inputs["weight"], inputs["bias"], None, softcap, 1.0, [3]), inputs["targets"]
    grads = torch.randn(2, rows, generator=seeded(1)).to(device).unbind()
    grads = (grads[0], grads[1] if entropy else None)
    with LargestOutput() as forward:
        _, *saved = functions.linear_logprob(*given, entropy, keep)
    with LargestOutput() as backward:
        functions.linear_logprob_backward(*grads, *given, Saved(*saved), [True] * 3)
    return forward.numel, backward.numel


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_logprob(softcap, entropy):
    found = largest_of_linear_logprob(_dispatch.module("linear_logprob", "cpu"), R, V, softcap, entropy, keep=False)
    assert all(V <= numel <= R * V // SHARE for numel in found)


@pytest.mark.parametrize("entropy", [True, False])
def test_linear_logprob_that_keeps(entropy):
    """Only the forward makes a tensor of R*V, which it keeps."""
    found = largest_of_linear_logprob(_dispatch.module("linear_logprob", "cpu"), R, V, None, entropy, keep=True)
    assert found[0] == R * V and found[1] <= R * V // SHARE


@pytest.mark.kernels
def test_linear_logprob_in_triton(monkeypatch):
    """Its buffers are R times a fixed number of ids, and a fixed number of logits; both are made small here.

    The interpreter copies them as bytes, four for each element.
    """
    functions = _dispatch.module("linear_logprob", "triton")
    monkeypatch.setattr(functions, "LOGITS", 2**12)
    monkeypatch.setattr(functions, "COLUMNS", 256)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, vocabulary = 64, 32 * functions._span(8192)
    found = largest_of_linear_logprob(functions, rows, vocabulary, None, True, False, device)
    assert all(vocabulary <= numel <= rows * vocabulary // SHARE for numel in found)


@pytest.mark.parametrize("options", [(None, None), (50, None), (None, 5.0)], ids=["plain", "window", "softcap"])
def test_thought_attention(way, options):
    """With one head, so that the number of heads can't hide a tensor of R*L per head."""
    layout = ThoughtLayout.every_position(1, 400, 2, 8)
    q, k, v, sinks = attention_inputs(seeded(0), layout, 1, 1, 4, sinks=True).values()
    rest = (layout.branches, AttentionOptions(0.5, *options, sinks))
    functions = _dispatch.module("thought_attention", "cpu")
    with LargestOutput() as forward:
        out, lse = functions.thought_attention(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=seeded(1))
    with LargestOutput() as backward:
        functions.thought_attention_backward(grad_out, q, k, v, out, lse, *rest)
    assert layout.M <= forward.numel <= layout.R * layout.L // SHARE
    assert layout.M <= backward.numel <= layout.R * layout.L // SHARE


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_thought_decode(way, softcap):
    """Decoding may make a tensor of all thoughts and all text, P*N*L, but not of all packed rows, P*N*(L+R)."""
    layout = ThoughtLayout.every_position(1, 400, 2, 8)
    inputs = decode_inputs(seeded(0), layout, 1, 1, 4, sinks=True)
    options = AttentionOptions(0.5, None, softcap, inputs.pop("sinks"))
    decode = _dispatch.module("thought_decode", "cpu").thought_decode
    with LargestOutput() as largest:
        decode(*inputs.values(), *layout.branches[:2], torch.tensor(7), options)
    thoughts = layout.P * layout.N
    assert thoughts <= largest.numel <= 2 * thoughts * layout.L
