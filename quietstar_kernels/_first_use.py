"""On a kind of GPU without published results, ``auto`` only takes a back end after one small case of the op came out right.

What is found holds until the process ends: the case is small, and Triton's own cache keeps its kernels. A back end that gives
something wrong, or that can't be compiled, is skipped, with a warning. An error that may come from elsewhere, such as a file
server or a full disk, says nothing about the back end: the case is run once more, and then the error is the caller's. Else one
process of many would go on with the dense reference.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# Each GPU with a results file, benchmarks/results/*.json, as torch.cuda.get_device_name names it.
MEASURED = frozenset({"NVIDIA H200"})
TYPES = ("cuda",)  # types of devices on which back ends are tried
_FROM_ELSEWHERE = (OSError, ImportError, RuntimeError)  # Triton's own errors of compilation are none of these
HAVE_BACKWARD = ("thought_attention", "linear_logprob", "rms_norm", "rotary", "gated_activation")

# By op, a small case: f(backend, device, dtype, **widths, backward=...), which raises AssertionError if the result is wrong.
# The package's __init__ puts them here: they call the ops, and the ops call this module.
CASES: dict[str, Callable[..., object]] = {}

Widths = tuple[tuple[str, int], ...]
_found: dict[tuple[str, str, torch.device, torch.dtype, Widths, bool], str | None] = {}
_lock = threading.Lock()


def why_not(
    op: str, backend: str, device: torch.device, dtype: torch.dtype | None, widths: Widths, backward: bool
) -> str | None:
    """None if ``backend`` gave the right result or can't be tried now; else what is wrong, in words.

    Args:
        device: its type is one of ``TYPES``.
        widths: such as (("K", 64), ("E", 64)).
        backward: try the backward of the op too.
    """
    if dtype is None:
        return None
    key = (op, backend, device, dtype, widths, backward and op in HAVE_BACKWARD)
    if key in _found:
        return _found[key]
    if _is_busy():
        return None
    with _lock:
        if key not in _found:
            _found[key] = _what_is_wrong(*key)
    return _found[key]


def found(op: str, backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """What was found wrong before, with any widths. For torch.compile, which tries nothing and may not know the widths."""
    wrong = (reason for key, reason in _found.items() if reason is not None and key[:4] == (op, backend, device, dtype))
    return next(wrong, None)


found._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it instead of tracing it


def _is_busy() -> bool:
    """Inside a CUDA graph capture, a backward, or a mode that changes what operations do, such as that of fake tensors."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or torch._C._current_graph_task_id() != -1 or torch._C._len_torch_dispatch_stack() > 0


def _what_is_wrong(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, widths: Widths, backward: bool
) -> str | None:
    kind = _kind(device)
    if kind in MEASURED:
        return None
    for last in (False, True):
        try:
            with ThreadPoolExecutor(1) as thread:  # a new one has none of the caller's state: autocast, hooks, streams
                thread.submit(_try, op, backend, device, dtype, dict(widths), backward).result()
            break
        except torch.OutOfMemoryError:
            raise  # this doesn't mean that the back end is wrong
        except _FROM_ELSEWHERE as error:
            if not last:
                continue
            raise RuntimeError(
                f"{op}: backend {backend!r} could not be tried on {kind} in {dtype}, twice: {type(error).__name__}: {error}. "
                "If it stays so, choose another with backend= or QUIETSTAR_BACKEND; where compilers share a cache on a "
                "network, set TRITON_CACHE_DIR to a folder of the node."
            ) from error
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else f"it raises {type(error).__name__}: {error}"
            warnings.warn(
                f"{op}: backend {backend!r} is wrong on {kind} in {dtype}, so backend='auto' takes the next one. {reason}. "
                "Please report this, with the output of `python -m quietstar_kernels check`.",
                stacklevel=6,
            )
            return f"it is wrong on {kind}: {reason}"
    return None


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _try(op: str, backend: str, device: torch.device, dtype: torch.dtype, widths: dict[str, int], backward: bool) -> None:
    """Raises AssertionError if the result is wrong."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    CASES[op](backend, device, dtype, **widths, **({"backward": backward} if op in HAVE_BACKWARD else {}))
