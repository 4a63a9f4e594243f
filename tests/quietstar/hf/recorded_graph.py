"""A stand-in for CUDA graphs on CPUs: the operations of a body are recorded once and repeated on the same memory.

As on a GPU, a replay runs no Python: it uses the numbers of the capture, and the tensors at their old addresses.
"""

from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from quietstar.hf.graphs import Graphs
from tests.quietstar.common import wrap

# Ways to read a tensor that bypass PyTorch's dispatcher when the tensor is on the CPU.
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.data_ptr, Tensor.untyped_storage}


def storages(tensors):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tensors) if isinstance(x, Tensor)}


class NoReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} in a graph"
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """
    Attributes:
        steps: each operation's function, arguments and result.
        outside: memory that the operations read or write but did not allocate.
        written: what was written there, and what it held before.
    """

    def __init__(self):
        super().__init__()
        self.steps, self.outside, self.written, self._made = [], set(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, x in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and not storages(x) <= self._made:
                self.written.append((x, x.clone()))
        out = func(*args, **(kwargs or {}))
        used = storages((args, kwargs))
        self.outside |= used - self._made
        self._made |= storages(out) - used
        self.steps.append((func, args, kwargs or {}, out))
        return out


class RecordedGraphs:
    """For ``quietstar.hf.graphs.Graphs(capture)``.

    Attributes:
        recordings: one for each capture.
        replays: the number of replays.
    """

    def __init__(self):
        self.recordings, self.replays, self.now = [], 0, None

    def why_not(self, device):
        return None

    def __call__(self, body, device, what):
        self.now = recording = Recording()
        with NoReads(), recording:
            outputs = body()
        self.now = None
        self.recordings.append(recording)

        def replay():
            self.replays += 1
            with torch.no_grad(), torch.autocast("cpu", enabled=False):  # the casts were recorded
                for func, args, kwargs, out in recording.steps:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        # Otherwise it is a view or was changed in place.
                        if isinstance(old, Tensor) and not storages(old) & storages(new):
                            old.copy_(new)

        with torch.no_grad():
            for x, before in reversed(recording.written):  # a capture on a GPU runs nothing
                x.copy_(before)
            for x in outputs:  # so that the capture's results can't be mistaken for a replay's
                x.fill_(-7)
        return outputs, replay


def compile_recorded(qs, **options):
    """Compile a model so that what is compiled can be recorded: Dynamo runs nothing that it compiled inside of a mode."""
    capture = qs._graphs.capture

    def backend(module, inputs):
        compiled = lookup_backend("aot_eager")(module, inputs)

        def run(*args):
            with capture.now or nullcontext():
                return compiled(*args)

        return run

    qs.compile(backend=backend, **options)
    decoder = qs.model.model
    compiled = decoder._compiled_call_impl

    @wraps(compiled)
    def call(*args, **kwargs):
        if capture.now is None:
            return compiled(*args, **kwargs)
        with _pop_mode_temporarily(), _disable_current_modes():
            return compiled(*args, **kwargs)

    decoder._compiled_call_impl = call


def with_recorded_graphs(model, **changes):
    """A QuietStar around a model, with changes to its config."""
    qs = wrap(model, lookahead=2, **changes).train()
    qs._graphs = Graphs(RecordedGraphs())
    return qs


def eager(qs):
    """The same weights, without graphs."""
    twin = qs.with_config(qs.thought_config)
    twin.graphs = False
    return twin
