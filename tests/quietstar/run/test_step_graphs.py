"""Steps by graphs, recorded on the CPU, equal eager steps bitwise: weights, gradients and metrics."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from quietstar.config import AdapterConfig
from quietstar.hf.graphs import Graphs
from quietstar.run.step_graphs import StepGraphs
from quietstar.training import thought_loss
from quietstar_kernels import checks as kernel_checks
from tests.quietstar.common import gradients, short_run, text, texts_of, wrap
from tests.quietstar.hf.recorded_graph import RecordedGraphs, compile_recorded, storages

SIZES = {"thoughts": 2, "thought_tokens": 2, "lookahead": 2, "policy_weight": 5.0, "embedding_scale": 1.0}
DATA = texts_of([9] * 12)
LOG = "quietstar.hf.graphs"


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """``run(by graphs, changes to the thoughts, ...)``: metrics and weights of a run, and the model.

    As on a GPU, values are not read for checks.
    """
    monkeypatch.setattr(kernel_checks, "HOST", "none")

    def make(graphs, thoughts=None, data=DATA, name="llama", change=None, after=None, **options):
        qs = wrap(tiny(name), **SIZES | (thoughts or {}))
        if change is not None:
            change(qs)
        qs.graphs = "auto" if graphs else False
        if graphs:
            qs._graphs = Graphs(RecordedGraphs())
        if after is not None:
            after(qs)
        AcceleratorState._reset_state()
        settings = {"steps": 5, "batch_size": 3, "learning_rate": 1e-3} | options
        lines = short_run(qs, data, tmp_path / str(graphs), **settings)
        return lines, {name: x.clone() for name, x in qs.state_dict().items()}, qs

    return make


@pytest.fixture
def made(monkeypatch):
    """All that were made."""
    found = []
    own = StepGraphs.__init__
    monkeypatch.setattr(StepGraphs, "__init__", lambda self, *args: found.append(self) or own(self, *args))
    return found


def assert_same(got, want):
    assert got[0] == want[0]
    assert got[1].keys() == want[1].keys() and all(torch.equal(x, want[1][name]) for name, x in got[1].items())


def logged(caplog):
    return [
        record.getMessage() for record in caplog.records if record.name == LOG and "model is on cpu" not in record.getMessage()
    ]


def adapted(qs):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    qs.add_adapters(AdapterConfig(lora_rank=2, lora_targets="q_proj,down_proj"))


# Settings, and how many graphs they take: of the rollout and of the parts of a step.
RUNS = {
    "one part": ({}, {}, 2),
    "parts": ({}, {"accumulation": 3}, 2),
    "updates": ({"ratio_clip": 0.2}, {"updates": 2, "accumulation": 3}, 3),
    "bf16": ({}, {"precision": "bf16"}, 2),
    "divergence and EMA": ({"kl_weight": 0.1, "base_model": "ema", "policy_temperature": 1.0}, {}, 2),
    "lengths": ({"end_token_id": 2, "stop_threshold": 1 / 61}, {}, 2),
    "anchors": ({"anchors": "random"}, {"accumulation": 3}, 2),
    "adapters": ({}, {"change": adapted}, 2),
    "fused": ({}, {"optimizer": "fused"}, 2),
    "another layer": ({}, {"name": "qwen2"}, 2),
}


@pytest.mark.parametrize("case", RUNS)
def test_steps_by_graphs_equal_eager_ones(run, made, caplog, case):
    thoughts, options, count = RUNS[case]
    want = run(False, thoughts, **options)
    got = run(True, thoughts, **options)
    assert_same(got, want)
    capture = got[2]._graphs.capture
    assert logged(caplog) == [] and len(capture.recordings) == count and capture.replays >= 2 * 3
    (steps,) = (x for x in made if x.graphs is not None)
    (graph, *_) = (x for x in steps.graphs._met.values() if x is not None)
    held = [*got[2].parameters(), *got[2].buffers(), *graph.inputs.values(), *(x for x in steps._grads if x is not None)]
    assert capture.recordings[1].outside <= storages(held), "the graph uses memory that may have been freed"


def test_a_compiled_decoder(run):
    """Forward and backward of the compiled code are in the graph."""
    torch.compiler.reset()
    want = run(False, change=lambda qs: qs.compile(backend="aot_eager"), steps=4)
    torch.compiler.reset()
    got = run(True, after=compile_recorded, steps=4)
    assert_same(got, want)
    assert got[2]._graphs.capture.replays == 4
    torch.compiler.reset()


def test_each_shape_has_its_graph(run, caplog):
    """Texts of 9 and of 7 tokens, mixed."""
    data = texts_of([9, 9, 7, 7])
    got, want = (run(graphs, data=data, batch_size=1, steps=12) for graphs in (True, False))
    assert_same(got, want)
    assert len(got[2]._graphs.capture.recordings) == 4 and not logged(caplog)


def by_hand(tiny, graphs=True, loss=thought_loss, eager_because=None, name="llama", **fields):
    """A model and its ``StepGraphs``."""
    qs = wrap(tiny(name), **SIZES | fields).train()
    qs.graphs = "auto" if graphs else False
    if graphs:
        qs._graphs = Graphs(RecordedGraphs())
    return qs, StepGraphs(qs, qs, Accelerator(), loss, eager_because)


def steps(qs, graphs, count, between=lambda i: None):
    """Gradients after each of a few steps on other texts."""
    optimizer, found = torch.optim.SGD(qs.parameters(), lr=0.1), []
    for i in range(count):
        between(i)
        texts = qs.texts(text(2, 9, seed=i), sequence_ids=torch.tensor([2 * i, 2 * i + 1]))
        graphs.zero_grad(optimizer)
        loss, out = graphs(texts, qs.count_targets(texts), seed=i)
        found.append((loss, out.reward, *gradients(qs).values()))
        assert set(gradients(qs)) == {
            name for name, weight in qs.named_parameters() if weight.requires_grad and weight.grad is not None
        }
        optimizer.step()
    return found


def same(got, want):
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(got, want, strict=True))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernel_checks, "HOST", "none")


def test_gradients_that_something_else_replaced(tiny, as_on_a_gpu):
    """A graph would add to the old ones: it is dropped."""

    def replace(i):
        if i == 4:
            qs.zero_grad()

    qs, graphs = by_hand(tiny)
    got = steps(qs, graphs, 8, replace)
    assert same(got, steps(*by_hand(tiny, graphs=False), 8))
    assert sum(recording.outside >= storages(qs.lm_head.linear.weight.grad) for recording in qs._graphs.capture.recordings) == 1
    assert len(qs._graphs.capture.recordings) == 3


def test_weights_that_nothing_reaches_keep_no_gradient(tiny, as_on_a_gpu):
    """An optimizer would decay them."""
    qs, graphs = by_hand(tiny, mix_weight=0.0, mixing="none")
    qs.unused = torch.nn.Parameter(torch.ones(3))
    graphs = StepGraphs(qs, qs, Accelerator(), thought_loss, None)
    steps(qs, graphs, 4)
    assert qs.unused.grad is None and qs._graphs.capture.replays == 4


@pytest.mark.parametrize("chunk, layers", [(None, True), (2, False)])
def test_recomputed_activations(tiny, as_on_a_gpu, chunk, layers):
    """A GPU refuses them, because they save the state of the random numbers."""
    found = []
    for graphs in (True, False):
        qs, step = by_hand(tiny, graphs)
        qs.anchor_chunk = chunk
        if layers:
            qs.gradient_checkpointing_enable()
        found.append(steps(qs, step, 4))
    assert same(*found)


def with_a_hook(qs):
    qs.start_embedding.register_hook(lambda grad: None)


REASONS = {
    "a loss": (lambda qs: None, {"eager_because": "the loss is a function of yours"}, "the loss is a function of yours"),
    "match": (lambda qs: None, {"reward": "match"}, "reward='match' reads thoughts on the host"),
    "a hook": (with_a_hook, {}, "there are hooks of gradients, which a replay would not call"),
    "dropout": (lambda qs: None, {"name": "gpt2"}, "aten."),
    "compiled dropout": (lambda qs: qs.compile(backend="aot_eager"), {"name": "gpt2"}, "it draws random numbers"),
    "compiler's graphs": (lambda qs: qs.compile(mode="reduce-overhead"), {}, "torch.compile makes CUDA graphs of its own"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(tiny, as_on_a_gpu, caplog, case):
    """Each is logged once, and the steps are eager ones."""
    caplog.set_level("DEBUG")
    change, options, reason = REASONS[case]
    qs, graphs = by_hand(tiny, **options)
    change(qs)
    if case == "compiler's graphs":  # which the CPU has not
        assert graphs.graphs.runner(qs, torch.device("cpu")).graphs is None and graphs.graphs.why == reason
        return
    torch.manual_seed(0)
    got = steps(qs, graphs, 4)
    qs, eager = by_hand(tiny, graphs=False, **options)
    change(qs)
    torch.manual_seed(0)
    assert same(got, steps(qs, eager, 4))
    (message,) = [x for x in logged(caplog) if x.startswith("steps ")]
    assert message.startswith(f"steps run without CUDA graphs: {reason}")
