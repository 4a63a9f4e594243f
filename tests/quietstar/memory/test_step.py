"""Memory estimates from a config, against real models and what autograd keeps for them."""

import inspect

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig
from quietstar.memory.step import CHUNK_COPIES, HEAD_CHUNK, HEAD_KEPT, HEAD_MOST, HEAD_ROWS, step_memory
from quietstar_kernels import linear_logprob
from quietstar_kernels.cpu import _head
from tests.quietstar.common import kept_for_backward, text

THOUGHTS = ThoughtConfig(thoughts=2, thought_tokens=4, lookahead=3)
B, L = 2, 16
ROWS = L * THOUGHTS.thoughts * THOUGHTS.rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "phi3"])
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
    assert (HEAD_CHUNK, HEAD_ROWS, HEAD_MOST) == (_head.LOGITS, _head.ROWS, _head.MOST)
    assert HEAD_KEPT == inspect.signature(linear_logprob).parameters["keep_bytes"].default


def test_chunks_of_anchors(tiny):
    """Only one chunk's thoughts, but several copies of the text's keys and values."""
    config = tiny("llama").config
    whole, chunk = (step_memory(config, THOUGHTS, B, L, anchor_chunk=size) for size in (None, L // 4))
    keys_values = 2 * 2 * (2 * 16) * 4
    assert chunk.thoughts == pytest.approx(whole.thoughts / 4, rel=0.01)
    assert chunk.text == whole.text + CHUNK_COPIES * B * L * keys_values
    assert chunk.rollout == B * (L + L // 4 * 2 * 4) * keys_values
    assert chunk.peak() < whole.peak() and chunk.weights == whole.weights
