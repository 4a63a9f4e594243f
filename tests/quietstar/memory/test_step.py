"""Memory estimates from a config, against real models and what autograd keeps for them."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig
from quietstar.hf import lm_head
from quietstar.memory import step
from quietstar.memory.step import CHUNK_COPIES, head_backward, head_calls, head_on_cpu, head_on_gpu, step_memory
from quietstar.thinking import chunks
from quietstar_kernels import linear_logprob
from quietstar_kernels._options import Head, Saved
from quietstar_kernels.cpu import _head
from tests.quietstar.common import Peak, kept_for_backward, text

THOUGHTS = ThoughtConfig(thoughts=2, thought_tokens=4, lookahead=3)
B, L = 2, 16
ROWS = L * THOUGHTS.thoughts * THOUGHTS.rows
REAL = [("llama", torch.float32), *((name, torch.bfloat16) for name in ("llama", "gpt2", "gemma2", "mixtral", "phi3"))]


@pytest.mark.parametrize("name, dtype", REAL)
def test_against_a_real_step(tiny, name, dtype):
    model = tiny(name, attn_pdrop=0.0) if name == "gpt2" else tiny(name)
    qs = QuietStar(model.to(dtype), THOUGHTS, verify=False)
    memory = step_memory(model.config, THOUGHTS, B, L, dtype)
    weights = sum(x.numel() * x.element_size() for x in qs.parameters())
    assert (memory.weights, memory.gradients, memory.moments) == (weights, weights, 2 * weights)
    ratio = (memory.text + memory.thoughts + memory.mixing) / kept_for_backward(qs.train(), text(B, L))
    assert 1 / 1.3 < ratio < 1.3


def test_parts_follow_the_sizes(tiny):
    config = tiny("llama").config
    memory = step_memory(config, THOUGHTS, B, L)
    twice = step_memory(config, THOUGHTS, 2 * B, L)
    assert twice.weights == memory.weights
    assert twice.thoughts == pytest.approx(2 * memory.thoughts, rel=0.01)
    assert memory.thoughts / memory.text == pytest.approx(ROWS / L, rel=0.01)
    # Two layers, keys and values of two heads of width 16, fp32; T rows of each thought.
    assert memory.rollout == B * (L + L * 2 * 4) * 2 * 2 * (2 * 16) * 4
    assert memory.peak(checkpointing=True) < memory.peak()


def test_the_head_constants_are_those_of_the_kernels():
    assert (step.HEAD_CHUNK, step.HEAD_ROWS, step.HEAD_MOST) == (_head.LOGITS, _head.ROWS, _head.MOST)
    on_gpu = pytest.importorskip("quietstar_kernels.triton.linear_logprob")
    assert (step.GPU_LOGITS, step.GPU_COLUMNS) == (on_gpu.LOGITS, on_gpu.COLUMNS)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("mixing", ["logits", "logprobs"])
def test_rows_of_the_head_are_those_of_a_real_step(tiny, mixing, chunk, monkeypatch):
    config = ThoughtConfig(thoughts=2, thought_tokens=4, lookahead=3, mixing=mixing)
    qs, rows = QuietStar(tiny("llama"), config, verify=False), []
    qs.anchor_chunk = chunk

    def counted(hidden, *arguments, **options):
        rows.append(len(hidden))
        return linear_logprob(hidden, *arguments, **options)

    thoughts = qs.think(text(B, 12), seed=0).thought_ids
    monkeypatch.setattr(lm_head, "linear_logprob", counted)
    qs.train()(text(B, 12), seed=0, thought_ids=thoughts)
    calls = head_calls(config, B, 12 - 1, chunk or 12, chunk is not None)  # the last token predicts nothing
    assert set(rows) == set(calls) and (chunk or len(rows) == len(calls))


V, D = 32768, 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [100, 3000, 10**6])
def test_memory_of_the_backward_of_the_head_on_a_gpu(rows, dtype, monkeypatch):
    """What Triton's backward allocates, on tensors without storage: no kernel runs, and products write into what they get."""
    kernel = pytest.importorskip("quietstar_kernels.triton.linear_logprob")
    monkeypatch.setattr(kernel, "_logits_gradient", defaultdict(lambda: lambda *arguments, **options: None))
    monkeypatch.setattr(kernel, "product", lambda a, b, out: out)
    monkeypatch.setattr(kernel, "add_product", lambda total, a, b: total)
    with torch.device("meta"):
        hidden, weight = torch.empty(rows, D, dtype=dtype), torch.empty(V, D, dtype=dtype)
        targets, state = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    head, saved = Head(weight, None, None, None, 1.0, []), Saved(state, state, state, None, None)
    with Peak(hidden, weight, targets, state) as peak:
        kernel.linear_logprob_backward(state, None, hidden, head, targets, saved, [True, False, False])
    assert head_backward(rows, V, D, dtype) == pytest.approx(peak.bytes, rel=0.01)
    assert kernel.empty_kept(hidden, weight)[0].nbytes == dtype.itemsize * rows * V


def test_what_the_head_keeps():
    """All logits of a call or none; on a GPU 1/16 of its memory, and fewer bytes for each."""
    few, many = 2**28 // (4 * V), 2**28 // (4 * V) + 1
    assert head_on_cpu([many, few], V, D, torch.bfloat16) - head_on_cpu([many], V, D, torch.bfloat16) == 2**28
    assert head_on_cpu([many, many], V, D, torch.bfloat16) == head_on_cpu([many], V, D, torch.bfloat16)
    most, less = (head_on_gpu([many, few], V, D, torch.bfloat16, 16 * size) for size in (2 * V * many, 2 * V * many - 1))
    assert most - less == 2 * V * many


def test_the_memory_of_the_gpu_that_is_here(tiny, monkeypatch):
    config = tiny("llama").config
    for here in (24 * 2**30, None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here is not None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda here=here: SimpleNamespace(total_memory=here))
        wanted = step_memory(config, THOUGHTS, B, L, gpu_bytes=here or 80 * 2**30)
        assert step_memory(config, THOUGHTS, B, L) == wanted and wanted.gpu_bytes == (here or step.GPU_BYTES)


@pytest.mark.parametrize("autocast", [False, True])
def test_auto_counts_what_the_head_takes_on_a_gpu(tiny, autocast, monkeypatch):
    """As many anchors at a time as fit, and not one more."""
    weight = SimpleNamespace(device=torch.device("cuda", 0), shape=(V, D), dtype=torch.float32)
    thinker = QuietStar(tiny("llama"), THOUGHTS, verify=False).thinker
    thinker = replace(thinker, lm_head=SimpleNamespace(linear=SimpleNamespace(weight=weight)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(chunks, "free_memory", lambda device: 8 * 2**30)
    budget = chunks.MemoryBudget.measure(thinker, [])

    def needed(P):
        calls, dtype = head_calls(THOUGHTS, 1, 4096, P, True), torch.bfloat16 if autocast else torch.float32
        return 4096 * budget.position + P * budget.anchor + head_on_gpu(calls, V, D, dtype, step.GPU_BYTES)

    P = budget.chunk(1, 4096)
    assert 1 < P < 4096 and needed(P) <= budget.free == int(0.7 * 8 * 2**30) < needed(P + 1)


def test_chunks_of_anchors(tiny):
    """Only one chunk's thoughts, but several copies of the text's keys and values."""
    config = tiny("llama").config
    whole, chunk = (step_memory(config, THOUGHTS, B, L, anchor_chunk=size) for size in (None, L // 4))
    keys_values = 2 * 2 * (2 * 16) * 4
    assert chunk.thoughts == pytest.approx(whole.thoughts / 4, rel=0.01)
    assert chunk.text == whole.text + CHUNK_COPIES * B * L * keys_values
    assert chunk.rollout == B * (L + L // 4 * 2 * 4) * keys_values
    assert chunk.peak() < whole.peak() and chunk.weights == whole.weights
