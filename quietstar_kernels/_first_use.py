"""On a kind of GPU without published results, ``auto`` only takes a back end after one small case of the op came out right.

A success is recorded in the user's cache folder, in a file for each kind of GPU, op, back end, dtype, widths and versions. A
back end that gives something wrong, or that can't be compiled, is skipped, with a warning, until the process ends; the next
process tries it again. An error that may come from elsewhere, such as a file server or a full disk, says nothing about
the back end: the case is run once more, and then the error is the caller's. Else one process of many would go on with the
dense reference.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Each GPU with a results file, benchmarks/results/*.json, as torch.cuda.get_device_name names it.
MEASURED = frozenset({"NVIDIA H200"})
TYPES = ("cuda",)  # types of devices on which back ends are tried
_FROM_ELSEWHERE = (OSError, ImportError, RuntimeError)  # Triton's own errors of compilation are none of these
HAVE_BACKWARD = ("thought_attention", "linear_logprob")

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
            _found[key] = _try_or_remember(*key)
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


def _try_or_remember(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, widths: Widths, backward: bool
) -> str | None:
    kind = _kind(device)
    if kind in MEASURED:
        return None
    trial = {"kind": kind, "op": op, "backend": backend, "dtype": str(dtype), "widths": dict(widths), "backward": backward}
    trial |= _took_part()
    if _was_right(trial):
        return None
    for last in (False, True):
        try:
            _in_a_thread(lambda: _try(op, backend, device, dtype, dict(widths), backward))
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
    _remember(trial)
    return None


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _in_a_thread(function: Callable[[], Any]) -> None:
    """A new thread has none of the caller's state: autocast, inference mode, saved-tensor hooks, streams."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def _try(op: str, backend: str, device: torch.device, dtype: torch.dtype, widths: dict[str, int], backward: bool) -> None:
    """Raises AssertionError if the result is wrong."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    CASES[op](backend, device, dtype, **widths, **({"backward": backward} if op in HAVE_BACKWARD else {}))


@functools.cache
def _took_part() -> dict[str, str | None]:
    """What the result depends on: versions, and a digest of this package as it is installed."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    found: dict[str, str | None] = {"package": digest.hexdigest(), "torch": torch.__version__, "triton": None}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def _file(trial: dict[str, Any]) -> Path:
    """Raises RuntimeError if the user has no home folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(json.dumps(trial, sort_keys=True).encode()).hexdigest()[:32]
    return Path(folder) / "quietstar_kernels" / f"{name}.json"


def _was_right(trial: dict[str, Any]) -> bool:
    with suppress(OSError, RuntimeError, ValueError):
        return bool(json.loads(_file(trial).read_text()) == trial)
    return False


def _remember(trial: dict[str, Any]) -> None:
    """Written to a temporary file and renamed, so that no file is incomplete. A folder that isn't writable is no error."""
    with suppress(OSError, RuntimeError):
        file = _file(trial)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "w") as new:
                json.dump(trial, new, indent=1)
            os.replace(path, file)
        except OSError:
            os.unlink(path)
            raise
