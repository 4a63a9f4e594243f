"""What ``auto`` tries before it takes a back end on an unknown GPU, and what it notes. Here the CPU takes that GPU's place."""

import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.append(str(Path(__file__).parent))
from small_calls import call

from quietstar_kernels import _dispatch, _first_use, linear_logprob, thought_decode
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
    raise RuntimeError("an illegal memory access")


CHANGES = {
    "scaled": (lambda out: 1.02 * out, "error .* exceeds"),
    "a NaN": (lambda out: out.clone().fill_(torch.nan), "error inf at"),
    "a dtype": (lambda out: out.double(), "got torch.float64, want torch.float32"),
    "raises": (raising, "it raises RuntimeError: an illegal memory access"),
}


@pytest.mark.parametrize("change, says", CHANGES.values(), ids=CHANGES)
def test_a_wrong_back_end_is_left_with_one_warning(change, says, tries, monkeypatch, tmp_path):
    plant(monkeypatch, "thought_decode", change)
    for _ in range(2):  # processes: a back end that was wrong is tried again
        new_process(monkeypatch)
        with pytest.warns(UserWarning) as warned:
            results = [call("thought_decode") for _ in range(3)]
        assert all(torch.equal(result, call("thought_decode", "reference")) for result in results)
        assert len(warned) == 1 and warned[0].filename.endswith("small_calls.py")
        assert re.match(f"thought_decode: backend 'cpu' {WRONG}.*{says}", str(warned[0].message))
    assert tries[0] == ("thought_decode", "cpu") and [name for _, name in tries].count("cpu") == 2
    written = (tmp_path / "cache/quietstar_kernels").iterdir()
    assert [json.loads(file.read_text())["backend"] for file in written] == ["reference"]


def test_the_last_back_end_that_is_wrong_leaves_the_reference(tries, monkeypatch):
    monkeypatch.setitem(_dispatch.FASTEST_FIRST, "cpu", ("cpu",))
    _dispatch._warn_dense.cache_clear()
    plant(monkeypatch, "thought_decode", lambda out: 2 * out)
    with pytest.warns(UserWarning) as warned:
        result = call("thought_decode")
    assert re.search(r"no fast back end .* \(cpu: it is wrong on Test GPU: .*runs 'reference'", str(warned[1].message))
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


@pytest.mark.parametrize(
    "error", [OSError(116, "Stale file handle"), ImportError("no module"), RuntimeError("ptxas was killed")]
)
def test_what_passes_says_nothing_about_a_back_end(error, tries, monkeypatch, tmp_path):
    """An error that comes once changes nothing. One of files that comes twice is raised, and the next call tries again."""
    case, left = _first_use.CASES["thought_decode"], [1]

    def at_first(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise error
        case(*arguments, **options)

    monkeypatch.setitem(_first_use.CASES, "thought_decode", at_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = call("thought_decode")
        assert tries == [("thought_decode", "cpu")] and len(files(tmp_path)) == 1
        new_process(monkeypatch)
        for file in files(tmp_path):
            file.unlink()
        left[0] = 2
        if isinstance(error, RuntimeError):
            with pytest.raises(UserWarning, match=f"{WRONG}it raises RuntimeError: ptxas was killed"):
                call("thought_decode")
            return
        with pytest.raises(type(error), match="could not be tried on Test GPU, twice: .* call it again, with TRITON_CACHE"):
            call("thought_decode")
        assert torch.equal(call("thought_decode"), want)


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


def files(tmp_path):
    return list((tmp_path / "cache/quietstar_kernels").glob("*"))


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_a_right_back_end_is_tried_once(op, tries, monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [call(op) for _ in range(3)]
    assert tries == [(op, "cpu")] and all(torch.equal(result, call(op, "cpu")) for result in results)
    (file,) = files(tmp_path)
    written = json.loads(file.read_text())
    assert (written["kind"], written["op"], written["backend"]) == ("Test GPU", op, "cpu") and written[
        "torch"
    ] == torch.__version__
    new_process(monkeypatch)
    call(op)
    assert len(tries) == 1


def test_another_version_is_tried_again(tries, monkeypatch):
    took_part = _first_use._took_part()
    for name in ("package", "torch", "triton"):
        for value in ("another", took_part[name]):
            new_process(monkeypatch)
            monkeypatch.setattr(_first_use, "_took_part", lambda changed={name: value}: took_part | changed)
            call("thought_decode")
    assert len(tries) == 4  # the usual one, and each of three others


def test_a_digest_tells_that_the_package_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(_first_use, "__file__", str(tmp_path / "_first_use.py"))
    digests = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.so", "2"), ("c.txt", "3")):
        (tmp_path / name).write_text(text)
        digests.add(_first_use._took_part.__wrapped__()["package"])
    assert len(digests) == 3  # text files are not code


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", None], ids=str)
def test_a_file_that_says_something_else_is_ignored(content, tries, monkeypatch, tmp_path):
    call("thought_decode")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content)
    for _ in range(2):
        new_process(monkeypatch)
        call("thought_decode")
    assert files(tmp_path) == [file], "nothing half written stays"
    if content is not None:
        assert len(tries) == 2 and file.read_bytes() == whole


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("where", ["a file", "no home"])
def test_a_folder_that_can_not_be_written(where, tries, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if where == "a file" else "")
    monkeypatch.setattr(Path, "home", no_home)
    call("thought_decode")
    call("thought_decode")
    assert len(tries) == 1 and not files(tmp_path)


PROCESS = """
import torch
from quietstar_kernels import _dispatch, _first_use, sample_token
from quietstar_kernels.testing import sample_inputs
tried, right = [], _first_use._try
_first_use.TYPES, _first_use._kind = ("cpu",), lambda device: "Test GPU"
_first_use._try = lambda *arguments: tried.append(1) or right(*arguments)
sample_token(**sample_inputs(torch.Generator(), 3), seed=0)
print(len(tried))
"""


@pytest.mark.kernels
def test_processes_share_what_they_found(tmp_path):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "shared")}
    run = partial(subprocess.run, [sys.executable, "-c", PROCESS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert [run(check=True).stdout.strip() for _ in range(2)] == ["1", "0"]
