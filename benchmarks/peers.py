"""Every way to compute an op behind one interface: ours, and what people use without it.

The peers of each kind of op stand in attention_peers.py, head_peers.py and model_peers.py, each called as its own
documentation says. ``compare`` asks ``why_not``, prepares, checks the result, and times only what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from case import Case, Work
from machine import package_version, served_by
from quietstar_kernels import backends

PACKAGE = "quietstar-kernels"  # ours


def _no_reason(case: Case) -> str | None:
    return None


def _no_needs(case: Case) -> Work:
    return Work()


@dataclass(frozen=True)
class Peer:
    """One candidate.

    Attributes:
        name: as tables show it.
        prepare: a case to the function that ``Case.call`` runs; not timed: masks, compilation.
        package: the distribution whose version its rows carry.
        why_not: None, or why it can't serve a case here.
        needs: FLOPs and bytes it will take, where they outgrow the useful ones; too much of either is not tried.
        compiles: its first call of a case takes seconds, and leaves what it compiled in a cache on disk.
        is_floor: it does only a part of the op's work, a bound and no rival; it isn't among the peers that ours is compared to.
    """

    name: str
    prepare: Callable[[Any], Callable[..., Any]]
    package: str = "torch"
    why_not: Callable[[Any], str | None] = _no_reason
    needs: Callable[[Any], Work] = _no_needs
    is_floor: bool = False
    compiles: bool = False

    @property
    def version(self) -> str:
        return f"{self.package} {package_version(self.package) or ''}".strip()


def not_installed(package: str) -> str | None:
    """The reason that a missing distribution gives."""
    return None if package_version(package) else f"{package} is not installed here"


def by_back_end(op: str, ours: Callable[..., Callable[..., Any]]) -> list[Peer]:
    """Ours again, by each of a GPU's back ends; ``ours`` takes its name beside the case."""

    def why_not(case: Case, name: str) -> str | None:
        status = {row["backend"]: row["status"] for row in backends(case.device) if row["op"] == op}[name]
        if status != "available":
            return status
        return "the back end that is taken where none is named" if served_by(case.device)[op] == name else None

    return [
        Peer(f"{op}, {name}", partial(ours, backend=name), PACKAGE, partial(why_not, name=name)) for name in ("cuda", "triton")
    ]
