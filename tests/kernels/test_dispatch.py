"""Which back end runs: a named one runs or raises, only "auto" chooses. What the package shows and imports."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from small_calls import call

import quietstar_kernels
from quietstar_kernels import __main__ as command
from quietstar_kernels import _dispatch, _first_use, backends, self_test, triton
from quietstar_kernels._options import AttentionOptions
from quietstar_kernels.cpu import _library
from quietstar_kernels.testing import attention_inputs

ROOT = Path(__file__).parents[2]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def on_a_cpu(op):
    return "reference" if op in _dispatch.OF_A_LAYER and _library.missing() else "cpu"


@pytest.mark.kernels
def test_module_prints_every_back_end():
    printed = python("-m", "quietstar_kernels")
    lines = printed.splitlines()
    assert lines[0].startswith(f"quietstar_kernels {quietstar_kernels.__version__} · torch {torch.__version__}")
    assert lines[1:3] == [quietstar_kernels.cpu_library(), quietstar_kernels.cuda_library()]
    for row in backends("cpu"):
        assert f"  {row['op']:<18} {row['backend']:<10} {row['status']}" in lines
    assert "  thought_conv       pytorch    available" in lines and "  thought_delta      matmul     available" in lines
    assert "  linear_logprob keeps logits for its backward up to 256 MiB" in lines


def test_backends_has_a_row_for_every_op_and_back_end():
    rows = backends("cpu")
    assert [(row["op"], row["backend"]) for row in rows] == [(o, b) for o in _dispatch.OPS for b in _dispatch.BACKENDS]
    status = {(row["op"], row["backend"]): row["status"] for row in rows}
    for op in _dispatch.OPS:
        assert status[op, "reference"] == "available"
        assert status[op, "cpu"] == ((_library.missing() if op in _dispatch.OF_A_LAYER else None) or "available")
        assert status[op, "cuda"] != "available"
    there = torch.device("cuda", torch.cuda.device_count())
    on_gpu = {row["backend"]: row["status"] for row in backends(there) if row["op"] == "sample_token"}
    assert on_gpu["reference"] == "available" and on_gpu["cpu"] == f"it serves tensors on cpu, these are on {there}"
    assert on_gpu["triton"] == f"there is no {there} here"


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_named_back_end_runs_or_raises_with_the_reason(op, monkeypatch):
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)
    served = []
    module = _dispatch.module
    monkeypatch.setattr(_dispatch, "module", lambda op, backend: served.append(backend) or module(op, backend))
    for row in backends("cpu"):
        if row["op"] != op:
            continue
        if row["status"] == "available":
            served.clear()
            call(op, row["backend"])
            assert served == [row["backend"]]
        else:
            with pytest.raises(ValueError) as error:
                call(op, row["backend"])
            assert str(error.value) == f"{op}: backend {row['backend']!r} is not available: {row['status']}"
    served.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(op, "auto")
    assert served == [on_a_cpu(op)]


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_unknown_back_end(op, monkeypatch):
    message = f"^{op}: backend must be one of auto, reference, cpu, triton, cuda, got 'fast'$"
    with pytest.raises(ValueError, match=message):
        call(op, "fast")
    monkeypatch.setenv("QUIETSTAR_BACKEND", "fast")
    with pytest.raises(ValueError, match=message):
        call(op, "auto")


def test_environment_variable_chooses_for_auto_alone(monkeypatch):
    device = torch.device("cpu")
    for name in ("reference", "cpu"):
        monkeypatch.setenv("QUIETSTAR_BACKEND", name)
        assert _dispatch.choose("sample_token", "auto", device) == name
        assert _dispatch.choose("sample_token", "cpu", device) == "cpu"
    monkeypatch.setenv("QUIETSTAR_BACKEND", "cuda")
    with pytest.raises(ValueError, match="^sample_token: backend 'cuda' is not available: "):
        _dispatch.choose("sample_token", "auto", device)
    assert _dispatch.choose("rms_norm", "auto", device) == on_a_cpu("rms_norm")


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_what_triton_refuses(op, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.why_not(op, "triton", cpu, torch.float16) is None
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=f"^{op}: backend 'triton' is not available: .*{dtype}"):
            _dispatch.choose(op, "triton", cpu, dtype)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="it serves GPUs; on cpu only Triton's interpreter"):
        _dispatch.choose(op, "triton", cpu, torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else name)
    assert _dispatch.why_not(op, "triton", cpu) == "Triton is not installed"


@pytest.mark.parametrize("op, widths", [("rotary", {"K": 7}), ("rotary_decode", {"K": 7}), ("rms_norm", {"D": 16385})])
def test_widths_that_triton_refuses(op, widths, monkeypatch):
    monkeypatch.setattr(triton, "_why_not_gpu", lambda device: None)
    assert _dispatch.choose(op, "auto", torch.device("cuda", 0), torch.float32, **widths) == "reference"
    (letter, size) = widths.popitem()
    assert _dispatch.why_not(op, "triton", torch.device("cuda", 0), torch.float32, **{letter: size - 1}) is None


@pytest.mark.parametrize("name", ["gfx942:sramecc+:xnack-", "gfx1100"])
def test_amd_gpus(name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    reason = None if name[:6] == "gfx942" else "it needs one of gfx90a, gfx942, gfx950, cuda:0 is gfx1100"
    assert triton._why_not_gpu.__wrapped__(torch.device("cuda", 0)) == reason


def test_auto_on_a_gpu_takes_triton_and_says_once_what_it_can_not(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.delenv("QUIETSTAR_BACKEND", raising=False)
    monkeypatch.setattr(triton, "_why_not_gpu", lambda device: None)
    monkeypatch.setattr(_first_use, "TYPES", ())
    _dispatch._warn_dense.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose("thought_attention", "auto", gpu, torch.bfloat16) == "triton"
    with pytest.warns(UserWarning, match="thought_attention: no fast .*triton: it does not compute in torch.float64"):
        assert _dispatch.choose("thought_attention", "auto", gpu, torch.float64) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose("thought_attention", "auto", gpu, torch.float64) == "reference"


@pytest.mark.parametrize("value, is_on", [(None, False), ("0", False), ("1", True), ("yes", None), ("", None)])
def test_switch_of_gluon(value, is_on, monkeypatch, capsys):
    monkeypatch.delenv("QUIETSTAR_GLUON", raising=False)
    if value is not None:
        monkeypatch.setenv("QUIETSTAR_GLUON", value)
    if is_on is not None:
        assert triton.gluon_is_on() == is_on
        return
    with pytest.raises(ValueError, match=f"^QUIETSTAR_GLUON must be 0 or 1, got {value!r}$"):
        triton.gluon_is_on()
    with pytest.raises(SystemExit, match="2"):
        command.main([])
    assert f"error: QUIETSTAR_GLUON must be 0 or 1, got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, reason",
    [
        (("sm_90",), None),
        (("sm_90", torch.bfloat16, 64, 64), None),
        (("sm_90", torch.float16, 128, 128), None),
        (("sm_100", torch.bfloat16, 64, 64), "they serve Hopper, sm_90, and this is sm_100"),
        (("sm_90", torch.float32, 64, 64), "they compute in 16 bits, not in torch.float32"),
        (("sm_90", torch.bfloat16, 256, 256), "they serve heads of 64 and of 128, got K 256 and E 256"),
        (("sm_90", torch.bfloat16, 64, 128), "they serve heads of 64 and of 128, got K 64 and E 128"),
    ],
)
def test_what_gluon_refuses(asked, reason):
    assert triton.gluon_why_not(*asked) == reason


def test_a_triton_without_gluon(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.nvidia.hopper", None)
    assert triton.gluon_why_not.__wrapped__("sm_90").startswith("this Triton has no Gluon: import of triton.experimental")


@pytest.mark.parametrize(
    "value, K, dtype, taken",
    [
        (None, 64, torch.bfloat16, "Triton"),
        ("0", 64, torch.bfloat16, "Triton"),
        ("1", 64, torch.bfloat16, "Gluon"),
        ("1", 128, torch.float16, "Gluon"),
        ("1", 64, torch.float32, "Triton"),
        ("1", 32, torch.bfloat16, "Triton"),
    ],
)
def test_attention_is_in_gluon_only_where_asked(value, K, dtype, taken, monkeypatch):
    from quietstar_kernels.triton import _launch
    from quietstar_kernels.triton.thought_attention import forward

    found = []
    stub = SimpleNamespace(launch=lambda *arguments: found.append("Gluon"))
    monkeypatch.setitem(sys.modules, "quietstar_kernels.triton.thought_attention.gluon_forward", stub)
    monkeypatch.setattr(forward, "gluon_forward", stub, raising=False)
    monkeypatch.setattr(forward, "target", lambda: "sm_90")
    monkeypatch.setattr(_launch.Plan, "launch", lambda *arguments: found.append("Triton"))
    monkeypatch.delenv("QUIETSTAR_GLUON", raising=False)
    if value is not None:
        monkeypatch.setenv("QUIETSTAR_GLUON", value)
    layout = self_test.chosen_anchors(20)
    inputs = attention_inputs(torch.Generator().manual_seed(0), layout, width=K, dtype=dtype)
    forward.thought_attention(*(inputs[name] for name in "qkv"), layout.branches, AttentionOptions(1.0, None, None, None))
    assert found == [taken]


def test_whose_kernels_attention_has_is_shown(monkeypatch, capsys):
    def shown():
        command.show_attention(torch.device("cpu"))
        return capsys.readouterr().out

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert shown() == ""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("QUIETSTAR_GLUON", "0")
    monkeypatch.setattr(command, "gluon_why_not_on", lambda device: "a reason")
    assert shown() == "attention: Triton's kernels; Gluon's do not run here: a reason\n"
    monkeypatch.setattr(command, "gluon_why_not_on", lambda device: None)
    assert "Triton's kernels; QUIETSTAR_GLUON=1 turns on Gluon's for heads of 64 and of 128 in 16 bits" in shown()
    monkeypatch.setenv("QUIETSTAR_GLUON", "1")
    assert shown() == "attention: Gluon's kernels for heads of 64 and of 128 in 16 bits, else Triton's\n"


def test_check_runs_what_gluon_serves():
    cases = [case for case in self_test.cases(interpreted=False) if case.op == "thought_attention"]
    for dtype, widths in ((torch.float16, {64}), (torch.bfloat16, {64, 128})):
        served = [case.arguments.get("K", 64) for case in cases if dtype in case.dtypes and "E" not in case.arguments]
        assert {*served} == widths and len(served) >= 5


@pytest.mark.long
def test_import_takes_torch_alone():
    code = """
import sys
import torch
before = set(sys.modules)
import quietstar_kernels.testing
taken = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(taken & {"transformers", "triton", "accelerate", "numpy", "quietstar"}), "quietstar_kernels" in taken)
"""
    assert python("-c", code).split() == ["True"]
