"""Rollouts as graphs read no values on the host, depend on no changing Python number, and equal eager rollouts bitwise."""

import dataclasses
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

from quietstar import QuietStar
from quietstar.config import AdapterConfig
from quietstar.hf import graphs
from quietstar.hf.graphs import Graphs
from quietstar.hf.merged_weights import groups_of
from tests.quietstar.hf.recorded_graph import RecordedGraphs, compile_recorded, eager, storages, with_recorded_graphs

B, L, N, T = 2, 12, 2, 4
END = 60


@pytest.fixture
def wrap(tiny):
    """``wrap(name, **config changes)``: a model whose graphs are recorded on the CPU."""
    return lambda name="llama", **changes: with_recorded_graphs(tiny(name), **{"thoughts": N, "thought_tokens": T, **changes})


def rollout(seed):
    """Texts with their own anchors, padding, sequence ids and seed; all have the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 59, (B, L), generator=generator)
    mask = torch.ones(B, L, dtype=torch.long)
    mask[1, : seed % 4] = 0
    anchors = torch.stack([torch.randperm(L - 4, generator=generator)[:5].sort().values + 4 for _ in range(B)])
    anchors[0, 5 - seed % 3 :] = -1
    lengths = torch.randint(0, T + 1, (B, 5, N), generator=generator)
    given = {"sequence_ids": torch.randint(0, 99, (B,), generator=generator), "seed": seed * 2**61}
    return {"input_ids": ids, "attention_mask": mask, "anchors": anchors, "thought_lengths": lengths, **given}


def assert_same(got, want):
    assert torch.equal(got.thought_ids, want.thought_ids)
    assert torch.equal(got.logprob, want.logprob)
    assert torch.equal(got.lengths, want.lengths)


def test_replays_equal_eager_rollouts(wrap, architecture):
    """With other texts, anchors, lengths, sequence ids and seeds, and after the weights were trained."""
    qs = wrap(architecture)
    capture = qs._graphs.capture
    for seed in range(4):
        given = rollout(seed)
        assert_same(qs.think(**given), eager(qs).think(**given))
    assert qs._graphs.why is None
    assert (len(capture.recordings), capture.replays) == (1, 2)
    (recording,) = capture.recordings
    (graph,) = (x for x in qs._graphs._met.values() if x is not None)
    kept = storages((list(qs.model.parameters()), list(qs.model.buffers()), list(graph.inputs.values())))
    assert recording.outside <= kept, "the graph uses memory that may have been freed"
    with torch.no_grad():
        qs.start_embedding.normal_()
        for weight in qs.model.parameters():
            weight.mul_(1.1)
    before, given = qs.think(**rollout(5)), rollout(5)
    assert_same(before, eager(qs).think(**given))
    assert (len(capture.recordings), capture.replays) == (1, 3)


@pytest.mark.parametrize("changes", [{"stop_threshold": 1 / 61}, {"start_token_id": 59}], ids=["stop", "banned"])
def test_thoughts_that_stop_and_banned_ids(wrap, changes):
    qs = wrap(end_token_id=END, **changes)
    lengths = set()
    for greedy in (False, True):
        for seed in range(3):
            given = rollout(seed) | {"thought_lengths": None, "greedy": greedy}
            thoughts = qs.think(**given)
            assert_same(thoughts, eager(qs).think(**given))
            lengths |= set(thoughts.lengths.flatten().tolist())
    assert qs._graphs.capture.replays == 2
    assert len(lengths) > 2 or "start_token_id" in changes


def test_autocast_casts_the_weights_again(wrap):
    qs = wrap()
    for seed in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
        with torch.no_grad():
            for weight in qs.model.parameters():
                weight.mul_(1.1)
    assert qs._graphs.capture.replays == 2
    assert_same(qs.think(**rollout(0)), eager(qs).think(**rollout(0)))  # without autocast: another graph
    assert qs._graphs.capture.replays == 2


class Counting(RecordedGraphs):
    """Counts what is compiled in captures."""

    compiled = 0

    def __call__(self, body, device, what):
        before = counters["frames"]["total"]
        made = super().__call__(body, device, what)
        self.compiled += counters["frames"]["total"] - before
        return made


@pytest.fixture
def forget_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_compiled_rollouts(wrap, forget_compiled):
    """A graph from before the compilation is dropped."""
    qs = wrap()
    qs._graphs = Graphs(Counting())
    capture = qs._graphs.capture
    for seed in range(3):
        qs.think(**rollout(seed))
    assert (len(capture.recordings), capture.replays) == (1, 1)
    compile_recorded(qs)
    for seed in range(4):
        assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
    assert (len(capture.recordings), capture.replays) == (2, 3)
    assert counters["stats"]["unique_graphs"] == 3 and not capture.compiled and qs._graphs.why is None
    assert not list(groups_of(qs.model)), "copies of weights that compiled code does not read"
    kept = storages((list(qs.model.parameters()), list(qs.model.buffers())))
    (graph,) = (x for x in qs._graphs._met.values() if x is not None)
    assert capture.recordings[1].outside <= kept | storages(list(graph.inputs.values()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_compiles_in_a_capture(wrap, caplog, forget_compiled, wrapped):
    qs = wrap()

    class Forgets(RecordedGraphs):
        def __call__(self, body, device, what):
            torch.compiler.reset()
            return body(), lambda: None

    qs._graphs = Graphs(Forgets())
    if wrapped:
        qs.model.model = torch.compile(qs.model.model, backend="eager")
    else:
        qs.compile(backend="eager")
    for seed in range(3):
        assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
    (message,) = logged(caplog)
    assert message.startswith("thoughts run without CUDA graphs: the capture failed: Detected recompile")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor compiles C++")
def test_rollouts_through_inductor(wrap, forget_compiled):
    """Its kernels can't be recorded: a replay runs the body again, which must compile nothing and leave the inputs alone."""

    class Repeats(Counting):
        def __call__(self, body, device, what):
            before, outputs = counters["frames"]["total"], body()
            self.compiled += counters["frames"]["total"] - before
            return outputs, lambda: [x.copy_(y) for x, y in zip(outputs, body(), strict=True)]

    qs = wrap()
    qs._graphs = Graphs(Repeats())
    qs.compile()
    for seed in range(4):
        assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
    assert qs._graphs.why is None and not qs._graphs.capture.compiled


def test_another_back_end_is_another_graph(wrap, monkeypatch):
    qs = wrap()
    for seed in range(3):
        qs.think(**rollout(seed))
    assert qs._graphs.capture.replays == 1
    monkeypatch.setenv("QUIETSTAR_BACKEND", "reference")
    assert_same(qs.think(**rollout(3)), eager(qs).think(**rollout(3)))
    assert qs._graphs.capture.replays == 1


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "quietstar.hf.graphs"]


def test_a_model_that_reads_values_runs_eagerly_and_logs_it_once(wrap, caplog):
    qs = wrap("mixtral")
    qs.model.config._experts_implementation = "eager"
    for seed in range(4):
        assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
    (message,) = logged(caplog)
    assert message.startswith("thoughts run without CUDA graphs: aten.") and "in modeling_mixtral.py, line" in message
    assert not qs._graphs.capture.recordings


def hooked(qs):
    qs.model.model.layers[0].register_forward_hook(lambda module, args, out: None)


def offloaded(qs):
    qs.model._hf_hook = None


def sharded(qs):
    qs.model.lm_head.weight.device_mesh = None


REASONS = {
    "sharded": (sharded, "the model's weights are sharded across processes"),
    "a hook": (hooked, "model.layers.0 has a hook, which a replay would not call"),
    "graphs of its own": (
        lambda qs: qs.compile(mode="reduce-overhead"),
        "torch.compile makes CUDA graphs of its own",
    ),
    "of a wrapped decoder": (
        lambda qs: setattr(qs.model, "model", torch.compile(qs.model.model, mode="max-autotune")),
        "torch.compile makes CUDA graphs of its own",
    ),
    "a layer's own": (
        lambda qs: qs.model.model.layers[0].compile(options={"triton.cudagraphs": True}),
        "torch.compile makes CUDA graphs of its own",
    ),
    "offloaded": (offloaded, "accelerate moves the weights of LlamaForCausalLM"),
    "two devices": (lambda qs: qs.model.lm_head.to("meta"), "the model is on 2 devices"),
    "a global hook": (lambda qs: None, "there are global module hooks, which a replay would not call"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(wrap, caplog, monkeypatch, case):
    change, reason = REASONS[case]
    qs = wrap()
    change(qs)
    if case == "a global hook":
        monkeypatch.setitem(torch.nn.modules.module._global_forward_hooks, 0, print)
    for _ in range(2):
        assert qs._graphs.runner(qs.model, qs.thinker.device).graphs is None
    assert qs._graphs.why == reason
    assert logged(caplog) == [f"thoughts run without CUDA graphs: {reason}"]


def test_chunks_of_anchors_use_no_graph(wrap):
    qs = wrap()
    qs.anchor_chunk = 2
    for seed in range(3):
        qs.think(**rollout(seed))
    assert not qs._graphs._met and qs._graphs.why == "anchor_chunk asks for less memory than a graph keeps"


def test_on_a_cpu_the_reason_is_logged_as_debug(tiny, caplog):
    caplog.set_level(logging.DEBUG)
    QuietStar(tiny("llama"), verify=False).think(torch.randint(3, 61, (1, 6)))
    assert [record.levelname for record in caplog.records if record.name == "quietstar.hf.graphs"] == ["DEBUG"]
    assert logged(caplog) == ["thoughts run without CUDA graphs: the model is on cpu"]


@pytest.mark.parametrize(
    "error, what", [(torch.OutOfMemoryError("no memory\nand more"), "no memory"), (RuntimeError(), "RuntimeError")], ids=str
)
def test_a_capture_that_fails(wrap, caplog, error, what):
    qs = wrap()

    class Fails(RecordedGraphs):
        def __call__(self, body, device, what):
            body()
            raise error

    qs._graphs = Graphs(Fails())
    for seed in range(3):
        assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
    assert logged(caplog) == [f"thoughts run without CUDA graphs: the capture failed: {what}"]


@pytest.mark.long
def test_threads_take_turns(wrap):
    """No call overwrites a graph's inputs while another call is replaying it."""

    class Slow(RecordedGraphs):
        def __call__(self, body, device, what):
            outputs, replay = super().__call__(body, device, what)
            return outputs, lambda: (time.sleep(0.1), replay())

    qs = wrap().eval()
    qs._graphs = Graphs(Slow())
    for seed in range(2):
        qs.think(**rollout(seed))
    with ThreadPoolExecutor(4) as pool:
        thoughts = list(pool.map(lambda seed: qs.think(**rollout(seed)), range(2, 6)))
    for seed, got in zip(range(2, 6), thoughts, strict=True):
        assert_same(got, eager(qs).think(**rollout(seed)))
    assert qs._graphs.capture.replays == 4


@pytest.mark.long
def test_switched_off_adapters_have_their_own_graphs(wrap):
    pytest.importorskip("peft")
    qs = wrap()
    qs.add_adapters(AdapterConfig(lora_rank=2, lora_targets="q_proj,down_proj"))
    with torch.no_grad():
        for name, weight in qs.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    capture = qs._graphs.capture
    for seed in range(3):
        on = qs.think(**rollout(seed))
        assert_same(on, eager(qs).think(**rollout(seed)))
        with qs.model.disable_adapter():
            off = qs.think(**rollout(seed))
            assert_same(off, eager(qs).think(**rollout(seed)))
        assert not torch.equal(on.logprob, off.logprob)
    assert (len(capture.recordings), capture.replays) == (2, 2)


def test_other_options_are_another_graph(wrap):
    """The options of a replaced config, or of a copy for scoring."""
    qs = wrap()
    for greedy, T in ((False, 4), (True, 4), (True, 2)):
        qs.thought_config = dataclasses.replace(qs.thought_config, thought_tokens=T)
        for seed in range(3):
            given = rollout(seed) | {"thought_lengths": None, "greedy": greedy}
            assert_same(qs.think(**given), eager(qs).think(**given))
    assert len(qs._graphs.capture.recordings) == 3


def test_moved_weights_drop_their_graphs(wrap):
    qs = wrap()
    for seed in range(3):
        qs.think(**rollout(seed))
    qs.model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(96, 64))
    for seed in range(3):
        assert_same(qs.think(**rollout(seed)), eager(qs).think(**rollout(seed)))
    assert (len(qs._graphs.capture.recordings), qs._graphs.capture.replays) == (2, 2)


def test_a_limited_number_is_kept(wrap, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    qs = wrap(thought_tokens=1)
    for length in (6, 7, 8, 6, 7, 8):  # none recurs among two
        qs.think(torch.randint(3, 61, (1, length)), seed=0)
    assert len(qs._graphs._met) == 2 and not qs._graphs.capture.recordings
