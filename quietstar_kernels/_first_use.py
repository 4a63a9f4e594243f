"""Before ``auto`` takes a back end on a kind of GPU that we have no results of, one small case of the op must come out right.

A success is remembered in the user's cache folder: a file for each kind of GPU, op, back end, dtype and widths, and the
versions. A back end that fails is skipped, with a warning, until the process ends; the next process tries it again.
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

# Names that torch.cuda.get_device_name gives: of each GPU with a results file, benchmarks/results/*.json.
MEASURED: frozenset[str] = frozenset()
TYPES = ("cuda",)  # of devices where back ends are tried
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
        device: of one of ``TYPES``.
        widths: such as (("K", 64), ("E", 64)).
        backward: try the op's backward too.
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
    """For torch.compile, which tries nothing and whose widths may be symbols: what was wrong before, in any width."""
    wrong = (said for key, said in _found.items() if said is not None and key[:4] == (op, backend, device, dtype))
    return next(wrong, None)


found._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it, as cuda._why_not_library


def _is_busy() -> bool:
    """In a CUDA graph's capture, in a backward, or in a mode that changes what operations do, as that of fake tensors."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or torch._C._current_graph_task_id() != -1 or torch._C._len_torch_dispatch_stack() > 0


def _try_or_remember(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, widths: Widths, backward: bool
) -> str | None:
    kind = _kind(device)
    if kind in MEASURED:
        return None
    what = {"kind": kind, "op": op, "backend": backend, "dtype": str(dtype), "widths": dict(widths), "backward": backward}
    what |= _took_part()
    if _was_right(what):
        return None
    try:
        _in_a_thread(lambda: _try(op, backend, device, dtype, dict(widths), backward))
    except torch.OutOfMemoryError:
        raise  # says nothing about the back end
    except Exception as error:
        said = str(error) if isinstance(error, AssertionError) else f"it raises {type(error).__name__}: {error}"
        warnings.warn(
            f"{op}: backend {backend!r} is wrong on {kind} in {dtype}, so backend='auto' takes the next one. {said}. "
            "Please report this with what `python -m quietstar_kernels check` prints.",
            stacklevel=6,
        )
        return f"it is wrong on {kind}: {said}"
    _remember(what)
    return None


def _kind(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _in_a_thread(function: Callable[[], Any]) -> None:
    """A thread of its own has none of the caller's state: autocast, inference mode, hooks on saved tensors, streams."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()


def _try(op: str, backend: str, device: torch.device, dtype: torch.dtype, widths: dict[str, int], backward: bool) -> None:
    """Raises AssertionError if the result is wrong."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    CASES[op](backend, device, dtype, **widths, **({"backward": backward} if op in HAVE_BACKWARD else {}))


@functools.cache
def _took_part() -> dict[str, str | None]:
    """Versions, and a digest of this package as it is installed."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    found: dict[str, str | None] = {"package": digest.hexdigest(), "torch": torch.__version__, "triton": None}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def _file(what: dict[str, Any]) -> Path:
    """Raises RuntimeError where there is no home."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    return Path(folder) / "quietstar_kernels" / f"{name}.json"


def _was_right(what: dict[str, Any]) -> bool:
    with suppress(OSError, RuntimeError, ValueError):
        return bool(json.loads(_file(what).read_text()) == what)
    return False


def _remember(what: dict[str, Any]) -> None:
    """In a file that is there as a whole or not at all. A folder that can't be written is no error."""
    with suppress(OSError, RuntimeError):
        file = _file(what)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=file.parent)
        try:
            with os.fdopen(handle, "w") as new:
                json.dump(what, new, indent=1)
            os.replace(path, file)
        except OSError:
            os.unlink(path)
            raise
