"""The two parts of a gain from thoughts: that of mixing in any thought, and that of what the own one says.

The mixing head and the extra steps can predict better whatever was thought. Another text's thoughts at the same places tell:
what they gain over no thought is the gain of mixing, and what own thoughts gain over them is the gain of content. The two add
up to the gain. Only content can be said to help.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quietstar.evaluation.intervals import mean_interval

__all__ = ["PARTS", "format_gain", "mean_gains", "parts_of", "verdict"]

PARTS = ("gain", "mixing", "content")
Figures = Mapping[str, float | None]


def parts_of(base: Tensor, mixed: Tensor, another: Tensor | None = None) -> dict[str, Tensor]:
    """The gain, and its parts mixing and content where they are known: gain = mixing + content.

    Args:
        base, mixed, another: losses [...] without a thought, with the own one and with another text's, nats.
    """
    parts = {"gain": base - mixed}
    if another is not None:
        parts |= {"mixing": base - another, "content": another - mixed}
    return parts


def mean_gains(base: Tensor, mixed: Tensor, another: Tensor | None = None) -> dict[str, float | None]:
    """The mean of each of ``parts_of`` over texts, with its 95 % interval: gain, gain_low, gain_high, mixing, ...

    Each text is compared with itself. With a single text there is no interval, and its ends are None.

    Args:
        base, mixed, another: mean losses of each text [texts], nats.
    """
    figures: dict[str, float | None] = {}
    for name, values in parts_of(base, mixed, another).items():
        figures[name], figures[f"{name}_low"], figures[f"{name}_high"] = mean_interval(values.tolist())
    return figures


def format_gain(figures: Figures, name: str = "gain", digits: int = 3) -> str:
    """One of the parts and, if there is one, its interval: +0.021 (+0.013 to +0.029)."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    mean = f"{figures[name]:+.{digits}f}"
    return mean if low is None else f"{mean} ({low:+.{digits}f} to {high:+.{digits}f})"


def verdict(figures: Figures) -> str:
    """In words, what the intervals of ``mean_gains`` allow to say: "helped" or "hurt" of content alone."""
    if "content" not in figures:
        return "not known whether what was thought helped: no other text's thoughts were tried"
    content, mixing = _sign(figures, "content"), _sign(figures, "mixing")
    if content > 0:
        return "what was thought helped: own thoughts predict better than another text's"
    if content < 0:
        said = "what was thought hurt: another text's thoughts predict better"
    else:
        said = "what was thought made no difference: another text's thoughts do as well"
    return said + ("\nthe gain is from mixing, whatever is thought" if mixing > 0 else "")


def _sign(figures: Figures, name: str) -> int:
    """1 or -1 where the whole interval is on that side of 0, else 0."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    return 0 if low is None or high is None else (low > 0) - (high < 0)
