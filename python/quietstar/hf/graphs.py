"""CUDA graphs: the many small launches of a rollout or of a training step, captured once per shape and then replayed as one.

A body is a function of tensors that makes no decision on the host, such as all steps of a rollout. The first call with given
shapes runs it eagerly, the second checks and captures it, and later calls copy their tensors into the graph's, replay it, and
copy the results out. Weights are read in place, so a graph stays valid while they are trained. If a body can't be captured, the
reason is logged once and the body runs eagerly: the same operations give the same numbers. What ``torch.compile`` made of a
model is captured like any other code.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from quietstar.hf import adapters
from quietstar.hf.modules import compiled_calls
from quietstar_kernels import ThoughtLayout

# Called with its inputs by name and ``whole``, which is True in a graph, where no step can be skipped depending on values.
Body = Callable[..., tuple[Tensor, ...]]
Call = Callable[[], tuple[Tensor, ...]]  # of a body

# How many shapes are remembered. A shape that recurs among this many is worth a graph.
MOST = 16
# The largest share of the device's memory that the graph of a rollout may keep.
SHARE = 1 / 8
TORCH, KERNELS = Path(torch.__file__).parent, Path(inspect.getfile(ThoughtLayout)).parent
# Packages whose hooks need not run in a replay.
_STATELESS_HOOKS = {"quietstar", "transformers", "peft"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runner:
    """Runs bodies: by graphs if it has ``graphs``, else eagerly."""

    graphs: Graphs | None = None
    state: tuple = ()  # what captured code depends on, besides the model's weights and the shapes

    def __call__(self, key: Hashable, body: Body, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The body's results, which may depend only on the inputs, on the key, and on tensors that stay where they are."""
        if self.graphs is None:
            return body(**inputs, whole=False)
        shapes = ((name, x.shape, x.dtype) for name, x in inputs.items())
        return self.graphs.run((self.state, key, *shapes), body, inputs)


EAGER = Runner()


class CudaCapture:
    """``torch.cuda.graph``; tests have another one, for CPUs. All graphs of a device share one memory pool, because only one
    runs at a time.

    A rollout's may keep ``SHARE`` of the device's memory. What a training step's keeps, its activations, an eager step needs
    as well, but can't take from the pool: as much must be left free, for steps of other shapes.
    """

    def __init__(self) -> None:
        # A pool and a stream for each device: on another device's stream, a capture would record nothing.
        self._places: dict[torch.device, tuple[Any, Any]] = {}

    def why_not(self, device: torch.device) -> str | None:
        """None if graphs can be captured on a device, else the reason in words."""
        if device.type != "cuda":
            return f"the model is on {device}"
        backend = os.environ.get("QUIETSTAR_BACKEND", "auto")
        return f"QUIETSTAR_BACKEND is {backend}" if backend in ("reference", "cpu") else None

    def __call__(self, body: Call, device: torch.device, what: str) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """The tensors that hold the results after each replay, and the function that replays. Raises RuntimeError.

        ``what``: thoughts or steps.
        """
        if device not in self._places:
            self._places[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        pool, stream = self._places[device]
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as a process group's, may make calls that a capture forbids.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved(device)
            outputs = body()
        kept = torch.cuda.memory_reserved(device) - before
        free, total = torch.cuda.mem_get_info(device)
        if kept > (free if what == "steps" else SHARE * total):
            raise RuntimeError(f"it would keep {kept / 2**30:.1f} GiB")
        return outputs, graph.replay


@dataclass
class _Graph:
    body: Body  # keeps the other tensors that the graph works on alive
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class Graphs:
    """At most ``MOST`` graphs of bodies that run one model. Threads take turns, and each stream waits for the previous one.

    Args:
        what: thoughts or steps, for the log and for how much memory they may keep.

    Attributes:
        why: why the last body couldn't run by a graph; None if it could.
        spare: an object that bodies work on, kept for as long as the graphs.
    """

    def __init__(self, capture: CudaCapture | None = None, what: str = "thoughts"):
        self.capture, self.what = capture or CudaCapture(), what
        self.why: str | None = None
        self._logged: set[str] = set()
        self._turn = threading.RLock()  # only one call at a time may use a graph's inputs and the pool
        self._stream: torch.cuda.Stream | None = None  # of the last call
        self._weights: tuple[int, ...] = ()
        self._calls: tuple[tuple[nn.Module, str, Call], ...] = ()  # of compiled modules
        self.clear()

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copy starts without graphs

    def apart(self, what: str = "thoughts") -> Graphs:
        """A separate set, for bodies that work on tensors which may be freed before these graphs."""
        others = Graphs(self.capture, what)
        others._logged, others._turn = self._logged, self._turn
        return others

    def clear(self) -> None:
        # By key: a graph, None if it was met only once, or the reason why there can be no graph.
        self._met: OrderedDict[Hashable, _Graph | str | None] = OrderedDict()
        self.spare: Any = None

    @property
    def any(self) -> bool:
        """Whether there is a graph."""
        return any(isinstance(known, _Graph) for known in self._met.values())

    def take_spare(self) -> Any:
        """Return ``spare`` and forget it, so that only the caller has it."""
        with self._turn:
            spare, self.spare = self.spare, None
        return spare

    def runner(self, model: nn.Module, device: torch.device, eager_because: str | None = None) -> Runner:
        """A runner that is valid until the model's weights move, its adapters change or ``torch.compile`` is called on it."""
        if torch.compiler.is_compiling():
            return EAGER
        if reason := self.capture.why_not(device) or eager_because:
            self._note_eager(reason, logging.DEBUG if device.type == "cpu" else logging.INFO)  # nothing unexpected
            return EAGER
        if reason := why_not(model):
            self._note_eager(reason)
            return EAGER
        self.why = None
        weights = tuple(x.data_ptr() for x in itertools.chain(model.parameters(), model.buffers()))
        calls = tuple((module, name, getattr(module, name)) for module, name in compiled_calls(model))
        with self._turn:
            if (weights, calls) != (self._weights, self._calls):
                self.clear()
                self._weights, self._calls = weights, calls
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        state = (device, autocast, torch.is_inference_mode_enabled(), adapters.active_state(model), _settings(model))
        return Runner(self, state)

    def run(self, key: Hashable, body: Body, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """See ``Runner``."""
        with self._turn:
            device = next(iter(inputs.values())).device
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if self._stream not in (None, stream):
                    stream.wait_stream(self._stream)
                self._stream = stream
            return self._run(key, body, inputs)

    def _run(self, key: Hashable, body: Body, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if key not in self._met:
            self._met[key] = None
            if len(self._met) > MOST:
                self._met.popitem(last=False)
            return EAGER(key, body, inputs)
        self._met.move_to_end(key)
        known = self._met[key]
        if known is None:
            outputs, self._met[key] = self._make(body, inputs)
            return outputs
        if isinstance(known, str):
            self._note_eager(known)
            return EAGER(key, body, inputs)
        for name, x in inputs.items():
            known.inputs[name].copy_(x)
        known.replay()
        return tuple(x.clone() for x in known.outputs)

    def _make(self, body: Body, inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], _Graph | str]:
        """The body's results, from a run that is checked and compiles every kernel, and a graph or the reason for none."""
        own = {name: x.clone() for name, x in inputs.items()}
        device = next(iter(own.values())).device
        generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        with _unwatched(self._calls), HostWork(device) as host:
            outputs = body(**own, whole=True)
        drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        if not torch.equal(generator, drawn) and host.found is None:
            host.found = "it draws random numbers"
        outputs = tuple(x.clone() for x in outputs)  # one may be an input, which the next call overwrites
        if host.found is not None:
            self._note_eager(host.found)
            return outputs, host.found
        # Autocast caches the weights it casts. The graph must cast them itself, and nothing else may use its copies.
        torch.clear_autocast_cache()
        try:
            # Nothing may compile while a graph is captured.
            with torch.compiler.set_stance("fail_on_recompile") if self._calls else nullcontext():
                results, replay = self.capture(lambda: body(**own, whole=True), device, self.what)
        except RuntimeError as error:
            reason = f"the capture failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            self._note_eager(reason)
            return outputs, reason
        finally:
            torch.clear_autocast_cache()
        return outputs, _Graph(body, own, results, replay)

    def _note_eager(self, reason: str, level: int = logging.WARNING) -> None:
        self.why = reason
        message = f"{self.what} run without CUDA graphs: {reason}"
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, message)


def why_not(model: nn.Module) -> str | None:
    """None if nothing in the model's modules rules out a capture of its forward, else the reason in words."""
    devices = {x.device for x in model.parameters()}
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices"
    if any(hasattr(x, "device_mesh") for x in model.parameters()):
        return "the model's weights are sharded across processes"
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "there are global module hooks, which a replay would not call"
    for module, name in compiled_calls(model):
        if (getattr(module, name).get_compiler_config() or {}).get("triton.cudagraphs"):
            return "torch.compile makes CUDA graphs of its own"
    for name, module in model.named_modules():
        where = f"{name or type(module).__name__}"
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves the weights of {where}"
        for hook in itertools.chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
            if (getattr(hook, "__module__", None) or "").split(".")[0] not in _STATELESS_HOOKS:
                return f"{where} has a hook, which a replay would not call"
    return None


def _settings(model: nn.Module) -> tuple:
    """Settings that choose the kernels of a body at run time: a graph replays the ones that were chosen."""
    config = getattr(model, "config", None)
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("QUIETSTAR_BACKEND"),
        *(getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")),
    )


class HostWork(TorchDispatchMode):
    """Finds what a graph can't contain: values and shapes read on the host, copies to or from it, and random numbers.

    It doesn't look inside custom operations and compiled code, or at what ``quietstar_kernels`` does around its own.

    Attributes:
        found: the first such operation and the line of code that made it; None if there was none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.found is None and _is_host_work(func, args, out, self.device):
            file, line = _line_of_code()
            if KERNELS not in file.parents:  # the kernels read values only on CPUs
                self.found = f"{func} in {file.name}" + (f", line {line}" if line else "")
        return out


@contextmanager
def _unwatched(calls: tuple[tuple[nn.Module, str, Call], ...]) -> Iterator[None]:
    """Run compiled code outside of dispatch modes: called inside of one, Dynamo runs it eagerly and gives it up for good."""

    def without_modes(call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return call(*args, **kwargs)

        return run

    for module, name, call in calls:
        setattr(module, name, without_modes(call))
    try:
        yield
    finally:
        for module, name, call in calls:
            setattr(module, name, call)


_VALUES_OR_SHAPES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


def _is_host_work(func: Any, args: tuple, out: Any, device: torch.device) -> bool:
    name = func._schema.name
    if name in _INDEXING:  # a mask becomes as many indices as it has ones
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in _COPIES:
        devices = {x.device for x in (*args[:2], out) if isinstance(x, Tensor)}
        return len(devices) > 1
    if name == "aten::lift_fresh":  # a Python constant: on the CPU it is a kernel argument, like a number
        return out.device == device
    return not _VALUES_OR_SHAPES.isdisjoint(func.tags)


def _line_of_code() -> tuple[Path, int | None]:
    """File and line of the innermost frame outside PyTorch and this file; a GPU's backward has a thread without frames."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
    ours = ((file, line) for file, line in reversed(frames) if file != Path(__file__) and TORCH not in file.parents)
    return next(ours, (Path("the backward"), None))
