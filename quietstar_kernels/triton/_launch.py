"""Kernel launches. Triton binds and specialises the arguments at every launch, 10 of its 30 µs; plans remember the results.

A host function looks up its plan by all the facts that its launches depend on. From the second call with the same facts,
kernels are launched directly, with the grid, the numbers and the compiled kernel of the first call and the new tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime._async_compile import AsyncCompileMode
from triton.tools.tensor_descriptor import TensorDescriptor

from ._device import Tile
from .configs import INTERPRETED, Config, dot_precision, target

THREADS = 8  # the compiler releases the GIL
BY_DESCRIPTOR = ("sm_90", "sm_100", "interpreter")  # targets that copy whole tiles to shared memory
CACHE = 16 << 20  # bytes of text that pairs read together: a third of an H100's L2 cache, as the pairs before and after do too
MOST = 4096  # plans to remember; then all are forgotten
Tiles = list[TensorDescriptor | None]
Choice = TypeVar("Choice")
_plans: dict[tuple, Plan] = {}
_only_compile: ContextVar[bool] = ContextVar("only_compile", default=False)


class Launch(NamedTuple):
    """``kernel[grid](*tensors, *numbers, **constants, **config.options())``, in the order of the kernel's parameters.

    A ``tile`` among the constants holds the blocks of the config.
    """

    kernel: Any
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]


class Plan:
    """The launches of a host function, by name. Use ``plan`` to get one."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.known: dict[tuple[str, Config], tuple] = {}
        self.described: dict[Config, Tiles] = {}
        self.choices: dict[str, Any] = {}

    def once(self, name: str, choose: Callable[[], Choice]) -> Choice:
        """What ``choose`` returned the first time under this name. It may only depend on the facts of the plan."""
        if name not in self.choices:
            self.choices[name] = choose()
        choice: Choice = self.choices[name]
        return choice

    def tiles(self, config: Config, tensors: tuple[Tensor, ...], describe: Callable[[], Tiles]) -> Tiles:
        """The descriptors of ``tensors`` that ``describe`` returns. Later calls put other tensors into them, unchecked."""
        known = self.described.get(config)
        if known is None:
            tiles = describe()
            self.described[config] = [tile and _same_tiles(tile, None) for tile in tiles]  # so that no tensor is kept alive
            return tiles
        return [tile and _same_tiles(tile, x) for tile, x in zip(known, tensors, strict=True)]

    def launch(self, name: str, config: Config, tensors: tuple[Any, ...], prepare: Callable[[], Launch]) -> None:
        """Launch what ``prepare`` returns. That and the dtypes and alignment of ``tensors`` depend only on the plan's facts."""
        known = self.known.get((name, config))
        if known is None:
            self._first(name, config, tensors, prepare())
            return
        compiled, run, function, metadata, grid, rest, record = known
        if record is not None:
            tensors = (*tensors[:record], tuple(tensors[record]), *tensors[record + 1 :])
        stream = triton.runtime.driver.active.get_current_stream(self.device)
        hooks = triton.knobs.runtime
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if enter.calls or leave.calls:
            about = compiled.launch_metadata(grid, stream, *tensors, *rest)
        else:
            enter = leave = about = None
        run(*grid, stream, function, metadata, about, enter, leave, *tensors, *rest)

    def _first(self, name: str, config: Config, tensors: tuple[Any, ...], launch: Launch) -> None:
        """Let Triton launch it, which compiles the kernel if necessary."""
        kernel, grid, numbers, constants = launch
        options = constants | (config.compiler() if "tile" in constants else config.options())
        if _only_compile.get():
            kernel.warmup(*tensors, *numbers, grid=grid, **options)
            return
        compiled = kernel[grid](*tensors, *numbers, **options)
        if getattr(compiled, "module", None) is not None:  # it was launched, neither interpreted nor only compiled
            rest = _plain((*numbers, *(options[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])))
            record = next((i for i, x in enumerate(tensors) if isinstance(x, tuple)), None)
            handles = compiled, compiled.run, compiled.function, compiled.packed_metadata
            self.known[name, config] = *handles, (*grid, 1, 1)[:3], rest, record


def _plain(x: Any) -> Any:
    """Records as tuples, which Triton 3.6 launches with 2 µs sooner."""
    return tuple(map(_plain, x)) if isinstance(x, tuple) else x


def _same_tiles(tiles: TensorDescriptor, x: Tensor | None) -> TensorDescriptor:
    """The same tiles of another tensor with the same dtype, shape, strides and alignment."""
    copy = object.__new__(tiles.__class__)  # Triton's class, or Gluon's
    copy.__dict__.update(tiles.__dict__)
    copy.base = x
    return copy


def plan(function: str, tensors: tuple[Tensor | None, ...], *facts: Any) -> Plan:
    """A host function's plan for the current device: that of an earlier call with equal facts, or a new one.

    Args:
        tensors: their dtypes, shapes, strides and alignment are facts.
        facts: all else that the launches depend on.
    """
    if INTERPRETED or _only_compile.get():
        return Plan(device=0)
    device = triton.runtime.driver.active.get_current_device()
    about = [x if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() & 15) for x in tensors]
    key = (function, device, *about, *facts)
    known = _plans.get(key)
    if known is None:
        if len(_plans) >= MOST:
            _plans.clear()
        known = _plans[key] = Plan(device)
    return known


@contextlib.contextmanager
def compiling_at_once() -> Iterator[None]:
    """Inside, launches only compile their kernels, in threads. The end of the block waits for them."""
    with ThreadPoolExecutor(THREADS) as threads, AsyncCompileMode(threads):
        token = _only_compile.set(True)
        try:
            yield
        finally:
            _only_compile.reset(token)


def near(x: Tensor) -> Tensor:
    """x with numbers of a row side by side, and rows so close that those of a tile have offsets of 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 1 << 23 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """x [...,width] as [rows,width], a view if rows are evenly spaced and the numbers of one side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def described(x: Tensor, *rows: int) -> list[TensorDescriptor] | list[None]:
    """Descriptors of x [B,heads,M,width] for tiles of each of ``rows``, or None for each if it must be read by pointer."""
    if x.itemsize == 4 or target() not in BY_DESCRIPTOR or not has_tiles(x):
        return [None] * len(rows)
    width = padded(x.shape[3])
    return [TensorDescriptor(x, list(x.shape), [*steps(x), 1], [1, 1, size, width]) for size in rows]


def steps(x: Tensor) -> list[int]:
    """Strides of the first three dimensions; those of length 1 may have any."""
    return [stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]


def has_tiles(x: Tensor) -> bool:
    """Whether a descriptor can describe x [B,heads,M,width]."""
    b, h, m = steps(x)
    return not (x.data_ptr() % 16 or x.numel() == 0 or 0 in (b, h, m) or (b | h | m) * x.itemsize % 16)


def key_tiles(k: Tensor, v: Tensor, config: Config, known: Plan, *blocks: str) -> Tiles:
    """Descriptors of k and v for tiles of each of ``blocks``, k first; None for all if one must be read by pointer."""

    def describe() -> Tiles:
        rows = [config.blocks[block] for block in blocks]
        tiles = [tile for pair in zip(described(k, *rows), described(v, *rows), strict=True) for tile in pair]
        return [None] * len(tiles) if None in tiles else tiles

    return known.tiles(config, (k, v) * len(blocks), describe)


def pairs_together(pairs: int, rows: int, width: int, itemsize: int) -> int:
    """How many of the ``pairs`` of a batch row and a key head take turns, if each reads ``rows`` of ``width`` numbers."""
    return max(1, min(pairs, CACHE // (max(rows, 1) * width * itemsize)))


def tile_of(config: Config, K: int, E: int) -> Tile:
    """What an attention kernel with these tiles is compiled for."""
    sizes = {"K": K, "E": E, "BLOCK_K": padded(K), "BLOCK_E": padded(E), "PRECISION": dot_precision()}
    return Tile(**{name: tl.constexpr(size) for name, size in (sizes | config.blocks).items()})


def padded(width: int) -> int:
    """Columns of a tile: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; ``triton.cdiv`` takes 2 µs."""
    return -(-a // b)
