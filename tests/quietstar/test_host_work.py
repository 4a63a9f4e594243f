"""What makes the host wait for the device: nothing in a body that becomes a graph, and little in a training step."""

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import quietstar
from quietstar import training
from quietstar.hf.graphs import HostWork
from quietstar.run import figures
from quietstar.run import parts as parts_of_step
from quietstar.testing import byte_tokenizer
from quietstar.thinking import cohorts
from quietstar_kernels import checks as kernel_checks
from tests.quietstar.common import short_run


@pytest.mark.parametrize(
    "work, name",
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense"),
        (lambda x: x if x.any() else -x, "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.index_put((x > 0,), x[0]), "index_put"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.unique(), "_unique2"),
        (lambda x: x if torch.equal(x, x) else -x, "equal"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x + torch.tensor([1.0]), "lift_fresh"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: x + torch.rand(4), "rand"),
        (lambda x: torch.nn.functional.dropout(x), "bernoulli"),
        (lambda x: x[x.long()] + x.cumsum(0).masked_fill(x > 0, 0) + torch.ones(4) + torch.where(x > 1, x, 2.0), None),
    ],
)
def test_work_for_the_host_is_seen(work, name):
    with HostWork(torch.device("cpu")) as host:
        work(torch.arange(4.0))
    assert host.found is None if name is None else f"aten.{name}" in host.found and "test_host_work.py" in host.found


def test_work_in_a_thread_without_python(monkeypatch):
    """As a GPU's backward has."""
    monkeypatch.setattr(traceback, "extract_stack", list)
    with HostWork(torch.device("cpu")) as host:
        torch.ones(3).nonzero()
    assert host.found == "aten.nonzero.default in the backward"


READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}  # no operators


class Reads(TorchDispatchMode):
    """The lines where values go to Python, or decide a shape: where a host waits if they are on a GPU."""

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "aten::index" in func._schema.name and isinstance(args[1], list | tuple):  # a mask decides a shape, ids don't
            reads = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        else:
            reads = not READS.isdisjoint(func.tags)
        if reads:
            self.add()
        return func(*args, **(kwargs or {}))

    def add(self):
        places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)]
        if any("torch/optim/" in file for file, _ in places):  # counts of steps, which PyTorch keeps on the CPU
            return
        file, line = next((file, line) for file, line in places if file != __file__ and "/torch/" not in file)
        self.lines[f"{file.rpartition('/')[2]}, line {line}"] += 1


class Methods(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in METHODS:
            self.reads.add()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """``gpu()`` is a context in which tensors are taken for those of a GPU; it gives the lines that read their values."""

    @contextmanager
    def context():
        with monkeypatch.context() as patch, Reads() as reads, Methods(reads):
            patch.setattr(kernel_checks, "HOST", "none")
            yield reads.lines

    return context


def wrapper(tiny, name="llama", **fields):
    options = {"thoughts": 2, "thought_tokens": 2, "lookahead": 2, "start_token_id": 1, "end_token_id": 2}
    return quietstar.QuietStar(tiny(name), quietstar.ThoughtConfig(**options | fields), verify=False)


TEXT = torch.arange(3, 23).view(2, 10)
DATA = [{"input_ids": torch.arange(i + 3, i + 13)} for i in range(8)]
CALLS = {
    "text": {},
    "padding": {"attention_mask": torch.ones_like(TEXT).index_fill(1, torch.tensor([9]), 0)},
    "documents": {"document_ids": torch.arange(10).expand(2, 10) // 5, "anchors": torch.tensor([[0, 3], [2, -1]])},
    "given": {"thought_ids": torch.full((2, 10, 2, 2), 9), "thought_lengths": torch.ones(2, 10, 2, dtype=torch.int64)},
}


@pytest.mark.parametrize("name, options", [*(("llama", name) for name in CALLS), ("gpt2", "padding")])
def test_a_forward_and_its_backward_read_nothing(tiny, gpu, name, options):
    """gpt2 has learned positions, which end."""
    qs = wrapper(tiny, name, kl_weight=0.1, policy_temperature=1.0)
    with gpu() as lines:
        qs(TEXT, **CALLS[options], labels=TEXT, seed=0).loss.backward()
    assert not lines


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda qs: qs(TEXT + 200), "input_ids must be from 0 to V-1"),
        (lambda qs: qs(TEXT - 1), "input_ids must not hold the end-of-thought id 2"),
        (lambda qs: qs(TEXT, attention_mask=TEXT % 2), "attention_mask must have its ones together"),
        (lambda qs: qs(TEXT, document_ids=TEXT % 2), "document_ids must keep a document together"),
        (lambda qs: qs(TEXT, thought_lengths=torch.full((2, 10, 2), 3)), "thought_lengths must be from 0 to T=2"),
        (lambda qs: qs(TEXT, thought_ids=torch.full((2, 10, 2, 2), 1)), "thought_ids must not hold the start"),
    ],
)
def test_a_gpu_asserts_what_it_is_given(tiny, gpu, call, message):
    qs = wrapper(tiny)
    with gpu() as lines, pytest.raises(RuntimeError, match=message):
        call(qs)
    assert not lines


@pytest.mark.parametrize("anchors, parts", [("all", 1), ("random", 4), ("every", 4)])
def test_a_training_step_reads_nothing(tiny, tmp_path, gpu, monkeypatch, anchors, parts):
    """From the moment its texts are moved, until its figures are read in the next step."""
    steps = []

    def step(*args):
        with ExitStack() as stack:

            def move(x, device, to=parts_of_step.moved):
                if len(steps) <= args[-1]:
                    steps.append(stack.enter_context(gpu()))
                return to(x, device)

            monkeypatch.setattr(parts_of_step, "moved", move)
            return own(*args)

    own = training.Run.step
    monkeypatch.setattr(training.Run, "step", step)
    qs = wrapper(tiny, anchors=anchors, kl_weight=0.1, policy_temperature=1.0)
    lines = short_run(qs, DATA, tmp_path, steps=3, accumulation=parts)
    assert [line["step"] for line in lines] == [1, 2, 3] and len(steps) == 3
    assert not any(steps), steps


@pytest.mark.parametrize(
    "chunk, N, mistake", [(None, 4, None), (1, 4, None), (2, 2, None), (1, 4, "in a step"), (1, 4, "at once")]
)
def test_a_rollout_of_text_reads_only_late_counts(tiny, gpu, monkeypatch, chunk, N, mistake):
    """A step does no work for the host. What is read was counted two steps before, but for how many thoughts there are."""
    monkeypatch.setattr(cohorts, "FIRST_ROWS", 4)
    steps, ages = [], []

    class Arriving(cohorts.HostCopy):  # as on a GPU, which writes into the host's memory by itself
        def __init__(self, values):
            self.steps = len(steps)
            with torch._C.DisableTorchFunction():
                self.values = values.tolist()

        def tolist(self):
            ages.append(len(steps) - self.steps)
            return self.values

    def step(rollout, now, *results):
        begun, width = sum(c.row == 0 for c in now), sum(c.place.shape[1] for c in now)
        with HostWork(torch.device("cpu")) as host:
            now = own(rollout, now, *results)
            if mistake == "in a step":
                now = [c for c in now if (c.place >= 0).any()]
        steps.append((begun, width, host.found))
        return now

    own = cohorts._Rollout.step
    monkeypatch.setattr(cohorts._Rollout, "step", step)
    fields = {"thoughts": N, "thought_tokens": 24, "thought_start": "<t>", "thought_end": "e", "temperature": 3.0}
    config = quietstar.ThoughtConfig(preset="rlp", **fields)
    qs = quietstar.QuietStar(tiny("llama", vocab_size=256), config, byte_tokenizer(), verify=False)
    likely = torch.zeros(256).index_fill(0, torch.tensor(ord("e") - 33), 10.0)
    qs.model.lm_head.bias = torch.nn.Parameter(likely)
    qs.anchor_chunk = chunk
    texts = qs.texts(TEXT, anchors=torch.tensor([[1, 3, 4, 6], [2, 5, -1, -1]]))
    wanted = qs.sample(texts, seed=7, greedy=False)
    at_once = len(steps)
    if mistake == "at once":
        monkeypatch.setattr(cohorts, "LAG", 0)
    monkeypatch.setattr(cohorts, "HostCopy", Arriving)
    with gpu() as lines:
        found = qs.sample(texts, seed=7, greedy=False)
    begun, widths, work = zip(*steps[at_once:], strict=True)
    assert bool(lines) == any(work) == (mistake == "in a step")
    assert ages[0] == 0 and set(ages[1:]) == {0 if mistake == "at once" else 2}
    assert torch.equal(found.thought_ids, wanted.thought_ids) and torch.equal(found.lengths, wanted.lengths)
    assert len(wanted.lengths.unique()) > 5 and (sum(begun) > 2 or chunk is None)
    assert at_once <= len(widths) <= at_once + 2 * sum(begun) and widths[-1] < max(widths)


def test_figures_of_a_step_are_read_after_the_next_is_queued(tiny, tmp_path, monkeypatch):
    """But before anything is saved or evaluated; and a loss that is not finite leaves the weights whole."""
    events = []
    own, read = training.Run.step, figures.Reading.figures
    monkeypatch.setattr(training.Run, "step", lambda *args: events.append(f"step {args[-1] + 1}") or own(*args))
    monkeypatch.setattr(training.snapshots, "save", lambda *args, **options: events.append("save"))
    monkeypatch.setattr(figures.Reading, "figures", lambda self: events.append("read") or read(self))

    def loss(model, batch, counts, seed):
        value, out = training.thought_loss(model, batch, counts, seed)
        return value * (torch.nan if events.count("save") else 1.0), out

    qs = wrapper(tiny)
    with pytest.raises(FloatingPointError, match="^train: the loss is nan at step 5: the model's weights are finite$"):
        short_run(qs, DATA, tmp_path, loss=loss, steps=6, batch_size=2, save_every=4)
    before = ["step 1", "step 2", "read", "step 3", "read", "step 4", "read", "read", "read", "save"]
    assert events == [*before, "step 5", "step 6", "read"]
    assert all(weight.isfinite().all() for weight in qs.parameters())
