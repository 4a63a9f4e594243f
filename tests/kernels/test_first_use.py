"""What ``auto`` tries before it takes a back end on an unknown GPU. Here the CPU takes that GPU's place."""

import json
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.append(str(Path(__file__).parent))
from small_calls import call

from quietstar_kernels import _dispatch, _first_use, linear_logprob, thought_decode
from quietstar_kernels.cpu import _library
from quietstar_kernels.testing import decode_inputs, logprob_inputs, random_layout

ROOT = Path(__file__).parents[2]
WRONG = r"is wrong on Test GPU in torch.float32, so backend='auto' takes the next one\. "


def new_process(monkeypatch):
    monkeypatch.setattr(_first_use, "_found", {})


def plant(monkeypatch, op, change, function=None):
    """Make the back end "cpu" of an op wrong."""
    module = _dispatch.module(op, "cpu")
    right = getattr(module, function or op)
    monkeypatch.setattr(module, function or op, lambda *arguments: change(right(*arguments)))


def raising(result):
    raise NotImplementedInHardware("too much shared memory")


class NotImplementedInHardware(Exception):
    """As Triton's errors, which are no RuntimeError."""


CHANGES = {
    "scaled": (lambda out: 1.02 * out, "error .* exceeds"),
    "a NaN": (lambda out: out.clone().fill_(torch.nan), "error inf at"),
    "a dtype": (lambda out: out.double(), "got torch.float64, want torch.float32"),
    "raises": (raising, "it raises NotImplementedInHardware: too much shared memory"),
}


@pytest.mark.parametrize("change, says", CHANGES.values(), ids=CHANGES)
def test_a_wrong_back_end_is_left_with_one_warning(change, says, tries, monkeypatch):
    plant(monkeypatch, "thought_decode", change)
    for _ in range(2):  # processes: a back end that was wrong is tried again
        new_process(monkeypatch)
        with pytest.warns(UserWarning) as warned:
            results = [call("thought_decode") for _ in range(3)]
        assert all(torch.equal(result, call("thought_decode", "reference")) for result in results)
        # Others may be there: files that earlier tests left open, closed by the garbage collector.
        (ours,) = [warning for warning in warned if str(warning.message).startswith("thought_decode")]
        assert ours.filename.endswith("small_calls.py")
        assert re.match(f"thought_decode: backend 'cpu' {WRONG}.*{says}", str(ours.message))
    assert tries[0] == ("thought_decode", "cpu") and [name for _, name in tries].count("cpu") == 2


def test_the_last_back_end_that_is_wrong_leaves_the_reference(tries, monkeypatch):
    monkeypatch.setitem(_dispatch.FASTEST_FIRST, "cpu", ("cpu",))
    _dispatch._warn_dense.cache_clear()
    plant(monkeypatch, "thought_decode", lambda out: 2 * out)
    dense = r"no fast back end .* \(cpu: it is wrong on Test GPU: .*runs 'reference'"
    with pytest.warns(UserWarning, match=WRONG), pytest.warns(UserWarning, match=dense):
        result = call("thought_decode")
    assert torch.equal(result, call("thought_decode", "reference"))


def test_a_wrong_gradient_is_seen_where_gradients_are_taken(tries, monkeypatch):
    plant(monkeypatch, "thought_attention", lambda grads: (grads[0], 1.02 * grads[1], *grads[2:]), "thought_attention_backward")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        call("thought_attention")
    with pytest.warns(UserWarning, match=WRONG + "step|gradient of k"):
        call("thought_attention")


def test_dtypes_and_widths_are_tried_apart(tries):
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        call("thought_decode", dtype=dtype)
    layout = random_layout(torch.Generator().manual_seed(0), "every")
    inputs = decode_inputs(torch.Generator().manual_seed(0), layout, width=16)
    thought_decode(**inputs, layout=layout, step=0)
    assert len(tries) == 3


def test_a_named_back_end_is_not_tried(tries, monkeypatch):
    plant(monkeypatch, "thought_decode", lambda out: 2 * out)
    want = 2 * call("thought_decode", "reference")
    torch.testing.assert_close(call("thought_decode", "cpu"), want)
    monkeypatch.setenv("QUIETSTAR_BACKEND", "cpu")
    torch.testing.assert_close(call("thought_decode"), want)
    assert not tries


def test_devices_with_results_and_cpus_are_not_tried(tries, monkeypatch):
    monkeypatch.setattr(_first_use, "MEASURED", frozenset({"Test GPU"}))
    call("thought_decode")
    new_process(monkeypatch)
    assert not tries
    monkeypatch.undo()
    call("thought_decode")
    assert not any(device.type == "cpu" for _, _, device, *_ in _first_use._found)


def test_measured_are_the_gpus_with_results():
    machines = [json.loads(file.read_text())["machine"] for file in (ROOT / "benchmarks/results").glob("*.json")]
    assert machines and {machine["device"] for machine in machines if machine["kind"] == "cuda"} == _first_use.MEASURED


def test_no_memory_says_nothing_about_a_back_end(tries, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        plant(patch, "thought_decode", full)
        with pytest.raises(torch.OutOfMemoryError):
            call("thought_decode")
    call("thought_decode")
    assert len(tries) == 2


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), ImportError("gone"), RuntimeError("failed")], ids=repr)
def test_an_error_from_elsewhere_says_nothing_about_a_back_end(error, tries, monkeypatch):
    failures = [error] * 3

    def fails(out):
        if failures:
            raise failures.pop()
        return out

    plant(monkeypatch, "thought_decode", fails)
    while len(failures) > 1:  # the second try failed, too
        with pytest.raises(RuntimeError, match=rf"could not be tried on Test GPU .*{type(error).__name__}: .*TRITON_CACHE_DIR"):
            call("thought_decode")
    assert torch.equal(call("thought_decode"), call("thought_decode", "cpu"))


def test_nothing_is_tried_in_a_capture_or_with_fake_tensors(tries, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layout = random_layout(generator, "every")
    inputs = decode_inputs(generator, layout)
    with monkeypatch.context() as patch:
        for name in ("is_initialized", "is_current_stream_capturing"):
            patch.setattr(torch.cuda, name, lambda: True)
        thought_decode(**inputs, layout=layout, step=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        thought_decode(**inputs, layout=layout, step=0)
    on_meta = {name: None if x is None else x.to("meta") for name, x in inputs.items()}
    thought_decode(**on_meta, layout=layout.to("meta"), step=0)
    assert not tries
    thought_decode(**inputs, layout=layout, step=0)
    assert tries == [("thought_decode", "cpu")]


def test_nothing_is_tried_in_a_backward(tries):
    """The thread of the trial would wait for this one."""

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            call("thought_decode")
            return grad

    x = torch.ones(1, requires_grad=True)
    Late.apply(x).sum().backward()
    assert not tries


def test_nothing_is_tried_by_torch_compile(tries, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = logprob_inputs(generator, 3)
    inputs["hidden"].requires_grad_()
    torch.compiler.reset()  # other tests compile the same function
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    compiled(**inputs).sum().backward()
    assert not tries
    plant(monkeypatch, "linear_logprob", lambda outputs: tuple(2 * x for x in outputs))
    with pytest.warns(UserWarning, match=WRONG):
        want = linear_logprob(**inputs)
    torch.compiler.reset()
    assert torch.equal(torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")(**inputs), want)


def test_the_callers_state_is_neither_seen_nor_changed(tries):
    """Hooks on saved tensors, such as those of checkpointing, would see those of the trial too."""
    generator = torch.Generator().manual_seed(0)
    inputs, layout = logprob_inputs(generator, 3), random_layout(generator, "every")
    decoded = decode_inputs(generator, layout)
    inputs["hidden"].requires_grad_()
    saved = []
    state = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(len(x)) or x, lambda x: x)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), hooks:
        linear_logprob(**inputs)
        with torch.inference_mode():
            thought_decode(**decoded, layout=layout, step=torch.tensor(0, device="cpu"))
    assert tries == [("linear_logprob", "cpu"), ("thought_decode", "cpu")]
    assert saved and set(saved) == {3, 333} and torch.equal(torch.get_rng_state(), state)


def test_threads_try_once(tries):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: call("thought_decode"), range(16)))
    assert len(tries) == 1 and all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_a_right_back_end_is_tried_once(op, tries):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [call(op) for _ in range(3)]
    backend = "reference" if op in _dispatch.OF_A_LAYER and _library.missing() else "cpu"
    assert tries == [(op, backend)] and all(torch.equal(result, call(op, backend)) for result in results)
