"""Numbers as tables show them: three digits and a unit that fits."""

from __future__ import annotations


def number(x: float) -> str:
    """Three significant digits, thousands with a comma."""
    if x >= 100:
        return f"{x:,.0f}"
    return f"{x:#.3g}".rstrip(".") if x else "0"


def count(size: int, noun: str) -> str:
    """Such as "1 case" or "3 cases"."""
    return f"{size} {noun}{'' if size == 1 else 's'}"


def seconds(x: float) -> str:
    for size, unit in ((1, "s"), (1e-3, "ms")):
        if x >= size:
            return f"{number(x / size)} {unit}"
    return f"{number(x * 1e6)} µs"


def flops(rate: float) -> str:
    return _rate(rate, "FLOP/s")


def bandwidth(rate: float) -> str:
    return _rate(rate, "B/s")


def _rate(rate: float, unit: str) -> str:
    size, prefix = next((pair for pair in ((1e12, "T"), (1e9, "G")) if rate >= pair[0]), (1e6, "M"))
    return f"{number(rate / size)} {prefix}{unit}"


def memory(size: float) -> str:
    return f"{number(size / 2**30)} GiB" if size >= 2**30 else f"{number(size / 2**20)} MiB"


def times(ratio: float) -> str:
    return f"{number(ratio)}x"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"
