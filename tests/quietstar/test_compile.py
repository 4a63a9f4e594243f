"""torch.compile: forward and backward as without, and few graphs however many steps a rollout has."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from quietstar.config import AdapterConfig
from tests.quietstar.common import assert_same_gradients, gradients, step, text, wrap

pytestmark = pytest.mark.long
IDS = text(2, 9)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def pair(tiny):
    """``pair(thought_tokens)``: a model of one layer and the same again, to be compiled."""

    def make(thought_tokens):
        fields = {"thought_tokens": thought_tokens, "lookahead": 2, "policy_weight": 5.0, "embedding_scale": 1.0}
        return [wrap(tiny("llama", num_hidden_layers=1), spread=0.2, **fields).train() for _ in range(2)]

    return make


def assert_same(got, want, bound=1e-5):
    for name in ("loss", "nll_base", "nll_mix", "weight", "reward", "logprob"):
        torch.testing.assert_close(got[0][name], want[0][name], rtol=bound, atol=bound)
    assert torch.equal(got[0].thought_ids, want[0].thought_ids) and want[0].reward.abs().max() > 0.01
    assert_same_gradients(got[1], want[1], bound)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor compiles C++")
def test_forward_and_backward_through_inductor(pair):
    """One graph, whole, for text and thoughts; it is used again at the second step."""
    plain, compiled = pair(2)
    thoughts = plain.think(IDS, seed=0).thought_ids
    compiled.compile(fullgraph=True)
    for _ in range(2):
        assert_same(step(compiled, IDS, seed=4, thought_ids=thoughts), step(plain, IDS, seed=4, thought_ids=thoughts))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_rollout_takes_three_graphs_for_any_number_of_steps(pair):
    """The text, the first row and any other; with the differentiable pass, four. With adapters, and as inductor gets them."""
    plain, compiled = pair(5)
    for qs in (plain, compiled):
        torch.manual_seed(0)
        qs.add_adapters(AdapterConfig(lora_rank=2, lora_targets="q_proj,down_proj"))
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, IDS, seed=4), step(plain, IDS, seed=4))
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


def test_chunks_and_layers_computed_again(pair):
    plain, compiled = pair(2)
    thoughts = plain.think(IDS, seed=0).thought_ids
    compiled.compile(backend="eager")
    compiled.gradient_checkpointing_enable()
    compiled.anchor_chunk = 4
    assert_same(step(compiled, IDS, seed=4, thought_ids=thoughts), step(plain, IDS, seed=4, thought_ids=thoughts))


def test_the_whole_wrapper_compiles(pair):
    """``torch.compile(qs)`` gives the same numbers; nothing looks at a value, so no graph breaks."""
    plain, compiled = pair(2)
    out, _ = step(torch.compile(compiled, backend="eager"), IDS, seed=4)
    assert_same((out, gradients(compiled)), step(plain, IDS, seed=4))
    assert not counters["graph_break"]
