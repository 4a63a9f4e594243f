"""Executes kernels with partitions as unkindly as hardware may, where ttsem 0.1.0 is kind.

ttsem runs a partition until it has to wait, and ends each copy and each product before the next operation. So a missing wait, a
phase that is off, or a buffer released too early may leave the results right. Here there are two schedules:

- late: a copy lands only when no partition can go on without it, and no copy lands that nobody waits for;
- early: copies land at once, and a partition that arrives at a barrier gives its turn to the others.

With both, a product of warp groups reads shared memory when it is waited for. Shared memory begins as NaN. What was stored
there without a fence is NaN to products, and so is what is copied over it. A program must wait for all that it began.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from ttsem import interp, ops
from ttsem.values import MemDesc, Unsupported

SCHEDULES = ("late", "early")
COPY, DOT = "ttng.async_tma_copy_global_to_local", "ttng.warp_group_dot"
schedule = "late"


class Copy(NamedTuple):
    barrier: int
    land: Callable[[], Any]


@dataclass
class Program:
    """What is on its way in the program that runs."""

    copies: list[Copy] = field(default_factory=list)
    waits: dict[int, int] = field(default_factory=dict)  # by thread, the barrier that it waits for
    products: dict[int, list[Callable[[], None]]] = field(default_factory=dict)  # by thread
    stored: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict)  # without a fence; by thread and place


def install() -> None:
    """Replace operations of ttsem, for the whole process."""
    before = dict(ops.OPS)

    def copy(run: Any, op: Any, args: list[Any]) -> list[Any]:
        *_, barrier, destination, _ = ops._segments(op, args, 6)
        if not_fenced(run, barrier[0]):
            raise Unsupported(COPY, "its barrier was made without a fence")

        def land() -> None:
            before[COPY](run, op, args)
            if not_fenced(run, destination[0]):
                fill_with_nan(destination[0])

        if schedule == "late" and run.scheduler is not None:
            program(run).copies.append(Copy(ops._barrier_key(barrier[0]), land))
        else:
            land()
        return []

    def wait(run: Any, op: Any, args: list[Any]) -> list[Any]:
        waits = program(run).waits
        waits[threading.get_ident()] = ops._barrier_key(args[0])
        before["ttng.wait_barrier"](run, op, args)
        del waits[threading.get_ident()]
        return []

    def arrive(run: Any, op: Any, args: list[Any]) -> list[Any]:
        before["ttng.arrive_barrier"](run, op, args)
        if schedule == "early" and run.scheduler is not None:
            give_turn_away(run.scheduler)
        return []

    def dot(run: Any, op: Any, args: list[Any]) -> list[Any]:
        result = np.full(np.shape(args[2]), np.nan, np.float32)

        def multiply() -> None:
            (result[...],) = before[DOT](run, op, [as_seen_by_products(run, x) for x in args])

        program(run).products.setdefault(threading.get_ident(), []).append(multiply)
        if "isAsync = true" not in op.text:
            wait_for_dots(run, op, [])
        return [result]

    def wait_for_dots(run: Any, op: Any, args: list[Any]) -> list[Any]:
        mine = program(run).products.get(threading.get_ident(), [])
        while len(mine) > int(ops._attr(op, "pendings", 0)):
            mine.pop(0)()
        return args[: len(op.result_types)]

    def allocate(run: Any, op: Any, args: list[Any]) -> list[Any]:
        (made,) = before["ttg.local_alloc"](run, op, args)
        if not args:
            fill_with_nan(made)
        return [made]

    def store(run: Any, op: Any, args: list[Any]) -> list[Any]:
        data = args[-1].data  # the first argument of ``ttng.init_barrier``, the second of ``ttg.local_store``
        program(run).stored[threading.get_ident(), data.__array_interface__["data"][0], data.nbytes] = data
        return before[op.name](run, op, args)

    def fence(run: Any, op: Any, args: list[Any]) -> list[Any]:
        state = program(run)
        state.stored = {key: data for key, data in state.stored.items() if key[0] != threading.get_ident()}
        return []

    ops.OPS |= {COPY: copy, DOT: dot, "ttng.warp_group_dot_wait": wait_for_dots}
    ops.OPS |= {"ttng.init_barrier": store, "ttng.wait_barrier": wait, "ttng.arrive_barrier": arrive}
    ops.OPS |= {"ttg.local_alloc": allocate, "ttg.local_store": store, "ttng.fence_async_shared": fence}
    wait_until_all_wait(interp.Scheduler)
    look_at_the_end(interp.Interp)


def wait_until_all_wait(scheduler: Any) -> None:
    """If nobody can go on, it is a deadlock only without copies on their way."""
    block_until = scheduler.block_until

    def block(self: Any, ready: Callable[[], bool], what: str) -> None:
        while True:
            try:
                return block_until(self, ready, what)
            except Unsupported:
                if self.error is not None:
                    raise self.error from None
                copies, waits = program(self.interp).copies, program(self.interp).waits.values()
                wanted = [i for i, copy in enumerate(copies) if copy.barrier in waits]
                if not wanted:
                    raise
                copies.pop(wanted[0]).land()

    scheduler.block_until = block


def look_at_the_end(run: Any) -> None:
    """A program may not end while something is on its way."""
    scheduled = run.run_scheduled

    def run_scheduled(self: Any, *partitions: Any) -> list[Any]:
        results = scheduled(self, *partitions)
        state, self.adversary = program(self), Program()
        if state.copies or any(state.products.values()):
            raise Unsupported("warp_specialize", "a copy or a product is on its way at the end")
        return results

    run.run_scheduled = run_scheduled


def program(run: Any) -> Program:
    if not hasattr(run, "adversary"):
        run.adversary = Program()
    return run.adversary


def give_turn_away(scheduler: Any) -> None:
    me = scheduler._me()
    with scheduler.cv:
        scheduler._pass_baton(me)
        scheduler.cv.wait_for(lambda: scheduler.current == me or scheduler.error is not None)
        if scheduler.error is not None and me != 0:
            raise interp._Aborted()


def as_seen_by_products(run: Any, x: Any) -> Any:
    if not isinstance(x, MemDesc) or not not_fenced(run, x):
        return x
    hidden = x.with_data(x.data.copy())
    fill_with_nan(hidden)
    return hidden


def not_fenced(run: Any, place: MemDesc) -> bool:
    return any(np.may_share_memory(place.data, data) for data in program(run).stored.values())


def fill_with_nan(place: MemDesc) -> None:
    """Integers become the smallest there is: as the length of a loop, none."""
    data, name = place.data, getattr(getattr(place.elem, "scalar", place.elem), "name", "")
    if name == "bf16":
        data[...] = 0x7FC0
    else:
        data[...] = np.nan if data.dtype.kind == "f" else np.iinfo(data.dtype).min
