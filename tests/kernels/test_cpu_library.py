"""The compiled library of the CPU back end: built where a compiler is, chosen by processor, left out with a reason."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from quietstar_kernels import ThoughtLayout, cpu_library, sample_token, thought_attention, thought_decode
from quietstar_kernels.cpu import _library
from quietstar_kernels.cpu import thought_attention as attention
from quietstar_kernels.testing import (
    assert_op_close_as_plain,
    attention_inputs,
    attention_magnitudes,
    decode_inputs,
    forward_backward,
    plain_attention,
    random_layout,
    sample_inputs,
)
from tests.kernels.drawn import seeded

ROOT = Path(__file__).parents[2]
HAS_COMPILER = bool(shutil.which(os.environ.get("CXX", "c++")))
MADE_HERE = Path(sys.prefix) in (ROOT / ".venv", ROOT / ".venv-lowest")  # by make, which compiles where it can
compiled = pytest.mark.skipif(_library.missing() is not None, reason="there is no CPU library here")


@pytest.mark.skipif(not (HAS_COMPILER and MADE_HERE), reason="there is no C++ compiler, or this is no environment of make's")
def test_it_is_there_where_a_compiler_is():
    assert _library.missing() is None


@pytest.fixture
def forget():
    _library._warn_slow.cache_clear()
    yield
    _library.missing.cache_clear()


def test_without_it_pytorch_runs(monkeypatch, tmp_path, forget):
    monkeypatch.setattr(_library, "FILE", tmp_path / "nothing.so")
    _library.missing.cache_clear()
    assert cpu_library() == f"no CPU library, so attention and decoding on CPUs run in PyTorch alone: {_library.PURE}"
    layout = random_layout(seeded(0), "ragged")
    with pytest.warns(UserWarning, match="pip install") as said:
        for _ in range(2):
            thought_attention(**attention_inputs(seeded(1), layout), layout=layout, backend="cpu")
    assert len(said) == 1


def test_one_that_does_not_load(monkeypatch, tmp_path, forget):
    (tmp_path / "broken.so").write_bytes(b"no ELF")
    monkeypatch.setattr(_library, "FILE", tmp_path / "broken.so")
    monkeypatch.setattr(_library, "_load", _library._load.__wrapped__)
    _library.missing.cache_clear()
    assert "its library does not load: " in cpu_library()


@compiled
def test_it_runs_what_it_serves(monkeypatch):
    """In fp32, fp16 and bf16 nothing of the composition in PyTorch runs, in fp64 nothing else."""
    called = []
    monkeypatch.setattr(_library, "ops", lambda: called.append(1) or torch.ops.quietstar_kernels_cpu)
    layout = random_layout(seeded(0), "every")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        called.clear()
        inputs = attention_inputs(seeded(1), layout, dtype=dtype)
        thought_attention(**inputs, layout=layout, backend="cpu")
        assert len(called) == (dtype != torch.float64)


@compiled
@pytest.mark.parametrize("size", [0, 1, 12_347])
def test_the_peaks_are_of_work_that_is_done(size):
    source, target = torch.randn(size, generator=seeded(0)), torch.full((size,), 7.0)
    _library.ops().copy(target, source)
    assert torch.equal(target, source)
    numbers = torch.randn(size % 4, 768, generator=seeded(1))
    expected = numbers.clone()
    _library.ops().multiply_adds(numbers, 100)
    for _ in range(100):
        expected += expected * 2**-20
    assert torch.equal(numbers, expected)


@compiled
@pytest.mark.build
def test_another_instruction_set_is_right():
    """PyTorch's own limit holds here too. tests/cpu_library compares all of them."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "quietstar_kernels", "check", "--device", "cpu", "--backend", "cpu"]
    command += ["--op", "thought_decode"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("CPU library "))
    assert line.endswith("running its code for baseline")


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    layout = random_layout(seeded(0), "ragged", max_text=60)
    inputs = attention_inputs(seeded(1), layout, 4, 2, 16, 16, True, "all", False, dtype)
    grad_out = torch.randn(inputs["q"].shape, generator=seeded(2)).to(dtype)
    decoding, hidden = decode_inputs(seeded(3), layout, 4, 2, 16), sample_inputs(seeded(4), 50, 8, 300)
    op = partial(thought_attention, return_lse=True, backend="cpu", layout=layout, window=9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs, grads = forward_backward(op, inputs, (grad_out,))
            decoded = thought_decode(**decoding, layout=layout, step=0, backend="cpu")
            results.append([*outputs, *grads.values(), decoded, *sample_token(**hidden, seed=1, backend="cpu")])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@compiled
@pytest.mark.parametrize("groups", [1, 16])
def test_one_part_sums_in_place_and_many_in_partial_sums(groups):
    """With 16 key heads there is one part each, so that no partial sums of the text are needed."""
    layout = ThoughtLayout.every_position(1, 40, 2, 3)
    inputs = attention_inputs(seeded(0), layout, 16, groups, 16)
    grad_out = torch.randn(inputs["q"].shape, generator=seeded(1))
    op = partial(thought_attention, return_lse=True, backend="cpu")
    magnitudes = attention_magnitudes(inputs, grad_out, None)
    assert_op_close_as_plain(op, plain_attention, inputs, (grad_out,), f"{groups}", magnitudes=magnitudes, layout=layout)


@compiled
@pytest.mark.parametrize("group, rows", [(2, 300), (300, 2), (1, 257)])
def test_thoughts_longer_than_a_tile(group, rows):
    """A thought whose rows and heads don't fit a tile, and whose own keys don't fit a block."""
    assert rows * group > attention.TILE
    length = torch.tensor([[[rows]], [[rows // 2]]])
    layout = ThoughtLayout.at(torch.tensor([[3], [1]]), 1, rows, text_length=5, length=length)
    inputs = attention_inputs(seeded(group), layout, group, 1, 8, 4, sinks=True)
    grad_out = torch.randn((*inputs["q"].shape[:3], 4), generator=seeded(1))
    op = partial(thought_attention, return_lse=True, backend="cpu")
    magnitudes = attention_magnitudes(inputs, grad_out, None)
    for window in (None, 150):
        assert_op_close_as_plain(
            op, plain_attention, inputs, (grad_out,), "long", magnitudes=magnitudes, layout=layout, window=window
        )
