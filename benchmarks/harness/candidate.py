"""A candidate: our op, or a baseline, which is what people use without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness.case import Case, Work
from benchmarks.harness.machine import package_version, served_by
from quietstar_kernels import __version__, backends
from quietstar_kernels.triton import gluon_is_on, gluon_why_not_on

PACKAGE = "quietstar-kernels"  # ours


def _no_reason(case: Case) -> str | None:
    return None


def _no_needs(case: Case) -> Work:
    return Work()


@dataclass(frozen=True)
class Candidate:
    """One candidate. ``compare`` calls ``why_not``, prepares it, checks its result, and times it only if that is right.

    Attributes:
        name: as tables show it.
        prepare: returns the function that ``Case.call`` runs for a case. What it does itself, such as building masks or
            compiling, is not timed.
        package: the distribution whose version is reported with it.
        why_not: why it can't run a case here, or None if it can.
        needs: FLOPs and bytes it takes, if they outgrow the useful ones. It isn't tried if either is too much.
        compiles: whether its first call of a case takes seconds and leaves a compiled kernel in a cache on disk.
        is_partial: whether it does only a part of the op's work, as a lower bound on the time. It is then no rival.
        switch: the context in which it is prepared, checked and called.
    """

    name: str
    prepare: Callable[[Any], Callable[..., Any]]
    package: str = "torch"
    why_not: Callable[[Any], str | None] = _no_reason
    needs: Callable[[Any], Work] = _no_needs
    is_partial: bool = False
    compiles: bool = False
    switch: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def version(self) -> str:
        ours = __version__ if self.package == PACKAGE else None  # which may run without being installed
        return f"{self.package} {ours or package_version(self.package) or ''}".strip()


def not_installed(package: str) -> str | None:
    """The reason to give if a distribution is missing, else None."""
    return None if package_version(package) else f"{package} is not installed here"


def by_back_end(op: str, ours: Callable[..., Callable[..., Any]]) -> list[Candidate]:
    """Ours again, once for each of a GPU's back ends. ``ours`` takes the back end's name in addition to the case."""

    def why_not(case: Case, name: str) -> str | None:
        status = {row["backend"]: row["status"] for row in backends(case.device) if row["op"] == op}[name]
        if status != "available":
            return status
        return "the default back end, measured above" if served_by(case.device)[op] == name else None

    return [
        Candidate(f"{op}, {name}", partial(ours, backend=name), PACKAGE, partial(why_not, name=name))
        for name in ("cuda", "triton")
    ]


def in_gluon(ours: Callable[..., Callable[..., Any]]) -> Candidate:
    """Attention's ``ours`` again, by the kernels in Gluon."""

    def why_not(case: Any) -> str | None:
        if (name := served_by(case.device)["thought_attention"]) != "triton":
            return f"attention is served by {name} here"
        if gluon_is_on():
            return "the default with QUIETSTAR_GLUON=1, measured above"
        return gluon_why_not_on(case.device, case.dtype, case.K)

    return Candidate("thought_attention, Gluon", ours, PACKAGE, why_not, switch=gluon)


@contextmanager
def gluon() -> Iterator[None]:
    """Attention takes the kernels in Gluon inside, in the backward too."""
    before = os.environ.get("QUIETSTAR_GLUON", "0")
    os.environ["QUIETSTAR_GLUON"] = "1"
    try:
        yield
    finally:
        os.environ["QUIETSTAR_GLUON"] = before
