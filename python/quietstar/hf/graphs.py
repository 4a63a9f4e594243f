"""CUDA graphs: a rollout's many small launches, captured once per shape and then replayed by the device as one.

A body is a function of tensors that decides nothing on the host, such as all steps of a rollout. The first call with some
shapes runs it eagerly, the second watches it and captures it, and later ones copy their tensors into the graph's, replay, and
copy the results out. Weights are read where they are, so training goes on under a graph. Where there can be no graph, a
sentence in the log says why, once, and the body runs eagerly: the same operations give the same numbers.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar.hf import adapters
from quietstar_kernels import ThoughtLayout

# Called with its inputs by name and ``whole``: True in a graph, where no step can be left out by a look at values.
Body = Callable[..., tuple[Tensor, ...]]
Call = Callable[[], tuple[Tensor, ...]]  # of a body

# Shapes that are remembered: one that comes again among so many is worth a graph.
MOST = 16
# Of the device's memory, what a graph may keep.
SHARE = 1 / 8
TORCH, KERNELS = Path(torch.__file__).parent, Path(inspect.getfile(ThoughtLayout)).parent
# Whose hooks do not mind that a replay calls none.
_STATELESS_HOOKS = {"quietstar", "transformers", "peft"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runner:
    """Runs bodies, with the graphs of ``graphs`` where it has some.

    Attributes:
        state: what captured code hangs on, beside the model's weights and shapes.
    """

    graphs: Graphs | None = None
    state: tuple = ()

    def __call__(self, key: Hashable, body: Body, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The body's results, which may depend on the inputs and on what the key says alone, and on tensors that stay."""
        if self.graphs is None:
            return body(**inputs, whole=False)
        shapes = ((name, x.shape, x.dtype) for name, x in inputs.items())
        return self.graphs.run((self.state, key, *shapes), body, inputs)


EAGER = Runner()


class Capture(Protocol):
    """What makes graphs; tests have one for CPUs."""

    def why_not(self, device: torch.device) -> str | None:
        """None where it works on a device, else the reason in words."""
        ...

    def __call__(self, body: Call, device: torch.device) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """The tensors that hold the body's results after each replay, and the replay. Raises RuntimeError."""
        ...


class CudaCapture:
    """``torch.cuda.graph``. All graphs of a device take their memory from one pool: only one runs at a time."""

    def __init__(self) -> None:
        # By device: a pool and a stream. On a stream of another device a capture would record nothing.
        self._places: dict[torch.device, tuple[Any, Any]] = {}

    def why_not(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the model is on {device}"
        backend = os.environ.get("QUIETSTAR_BACKEND", "auto")
        return f"QUIETSTAR_BACKEND is {backend}" if backend in ("reference", "cpu") else None

    def __call__(self, body: Call, device: torch.device) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        if device not in self._places:
            self._places[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        pool, stream = self._places[device]
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of a process group, may go on with calls that a capture forbids.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved(device)
            outputs = body()
        kept = torch.cuda.memory_reserved(device) - before
        if kept > SHARE * torch.cuda.get_device_properties(device).total_memory:
            raise RuntimeError(f"it would keep {kept / 2**30:.1f} GiB")
        return outputs, graph.replay


@dataclass
class _Graph:
    body: Body  # holds the tensors that the graph works on, but for these
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


class Graphs:
    """Graphs of bodies that run one model, at most ``MOST``. Threads take turns, and a stream waits for the one before it.

    Attributes:
        why: the reason why the last body ran without a graph, None where it did not have to.
        spare: anything that bodies work on and that is to live as long as the graphs.
    """

    def __init__(self, capture: Capture | None = None):
        self.capture = capture or CudaCapture()
        self.why: str | None = None
        self._said: set[str] = set()
        self._turn = threading.RLock()  # a replay's inputs, and the pool, are those of one call at a time
        self._stream: torch.cuda.Stream | None = None  # of the last call
        self.clear()

    def __reduce__(self) -> tuple:
        return Graphs, ()  # a copy has graphs of its own

    def apart(self) -> Graphs:
        """Others, for bodies that work on tensors which may go before these do."""
        others = Graphs(self.capture)
        others._said, others._turn = self._said, self._turn
        return others

    def clear(self) -> None:
        # By key: a graph, or None for a shape that was met once, or the reason why there can be none.
        self._met: OrderedDict[Hashable, _Graph | str | None] = OrderedDict()
        self._weights: tuple[int, ...] = ()
        self.spare: Any = None

    def take_spare(self) -> Any:
        """``spare``, for the caller alone."""
        with self._turn:
            spare, self.spare = self.spare, None
        return spare

    def runner(self, model: nn.Module, device: torch.device, but: str | None = None) -> Runner:
        """What runs bodies until the model's weights move or its adapters change.

        Args:
            but: why these bodies are to have no graph.
        """
        if torch.compiler.is_compiling():
            return EAGER
        if reason := self.capture.why_not(device) or but:
            self._say(reason, logging.DEBUG if device.type == "cpu" else logging.INFO)  # as was to be expected
            return EAGER
        if reason := why_not(model):
            self._say(reason)
            return EAGER
        self.why = None
        weights = tuple(x.data_ptr() for x in itertools.chain(model.parameters(), model.buffers()))
        with self._turn:
            if weights != self._weights:
                self.clear()
                self._weights = weights
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        state = (device, autocast, torch.is_inference_mode_enabled(), adapters.switches(model), _settings(model))
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
            self._say(known)
            return EAGER(key, body, inputs)
        for name, x in inputs.items():
            known.inputs[name].copy_(x)
        known.replay()
        return tuple(x.clone() for x in known.outputs)

    def _make(self, body: Body, inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], _Graph | str]:
        """The body's results, from a run that is watched and compiles every kernel; and a graph, or why there is none."""
        own = {name: x.clone() for name, x in inputs.items()}
        device = next(iter(own.values())).device
        with HostWork(device) as host:
            outputs = body(**own, whole=True)
        if host.found is not None:
            self._say(host.found)
            return outputs, host.found
        # What autocast has cast is kept: the graph is to cast the weights itself, and nobody else is to use its copies.
        torch.clear_autocast_cache()
        try:
            results, replay = self.capture(lambda: body(**own, whole=True), device)
        except RuntimeError as error:
            reason = f"the capture failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            self._say(reason)
            return outputs, reason
        finally:
            torch.clear_autocast_cache()
        return outputs, _Graph(body, own, results, replay)

    def _say(self, reason: str, level: int = logging.WARNING) -> None:
        self.why = reason
        if reason not in self._said:
            self._said.add(reason)
            logger.log(level, "thoughts run without CUDA graphs: %s", reason)


def why_not(model: nn.Module) -> str | None:
    """None for a model whose forward may be captured, as far as its modules tell, else the reason in words."""
    devices = {x.device for x in model.parameters()}
    if len(devices) > 1:
        return f"the model is on {len(devices)} devices"
    if any(hasattr(x, "device_mesh") for x in model.parameters()):
        return "the model's weights are cut over processes"
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "there are global module hooks, which a replay would not call"
    for name, module in model.named_modules():
        where = f"{name or type(module).__name__}"
        if getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules:
            return f"{where} is compiled"
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves the weights of {where}"
        for hook in itertools.chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
            if (getattr(hook, "__module__", None) or "").split(".")[0] not in _STATELESS_HOOKS:
                return f"{where} has a hook, which a replay would not call"
    return None


def _settings(model: nn.Module) -> tuple:
    """What chooses the kernels of a body when it runs, so that a graph holds what was chosen."""
    config = getattr(model, "config", None)
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("QUIETSTAR_BACKEND"),
        *(getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")),
    )


class HostWork(TorchDispatchMode):
    """Notes what a graph can't hold: values and shapes that go to the host, copies to or from it, and random numbers.

    Custom operations are not looked into, nor is what ``quietstar_kernels`` does around its own.

    Args:
        device: where the body runs.

    Attributes:
        found: the first such operation and the line of code it came from, None where there was none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.found is None and _is_host_work(func, args, out, self.device):
            file, line = _line_of_code()
            if KERNELS not in file.parents:  # which look at values on CPUs alone
                self.found = f"{func} in {file.name}, line {line}"
        return out


_VALUES_OR_SHAPES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


def _is_host_work(func: Any, args: tuple, out: Any, device: torch.device) -> bool:
    name = func._schema.name
    if name in _INDEXING:  # of masks it makes indices, as many as they have ones
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name in _COPIES:
        devices = {x.device for x in (*args[:2], out) if isinstance(x, Tensor)}
        return len(devices) > 1
    if name == "aten::lift_fresh":  # a constant of Python's; without a device's memory it is an argument like a number
        return out.device == device
    return not _VALUES_OR_SHAPES.isdisjoint(func.tags)


def _line_of_code() -> tuple[Path, int | None]:
    """The innermost one outside PyTorch and this file."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_stack()]
    return next((file, line) for file, line in reversed(frames) if file != Path(__file__) and TORCH not in file.parents)
