"""95 % intervals of accuracies, means and gains, and the parts of a gain from thoughts.

The mixing head and the extra steps can improve predictions whatever was thought. Another text's thoughts at the same places
tell the two apart: what they gain over no thought is the gain of mixing, and what the text's own thoughts gain over them is the
gain of content. The two add up to the gain. Thoughts helped where both the gain and its content are above 0: another text's can
mislead, so own ones may be better than these and worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from quietstar_kernels.checks import flag, integer, items, number

Z = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations


def wilson(right: int, questions: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), which stays inside 0 to 1 and has a positive width even at both ends.

    Raises:
        ValueError: there is no question, or there are more right answers than questions.
    """
    right, questions = integer("wilson: right", right), integer("wilson: questions", questions)
    if not 0 <= right <= questions or questions < 1:
        raise ValueError(f"wilson: right must be from 0 to questions, and questions 1 or more, got {right} of {questions}")
    share, z2 = right / questions, Z * Z
    middle = (share + z2 / (2 * questions)) / (1 + z2 / questions)
    margin = Z / (1 + z2 / questions) * math.sqrt(share * (1 - share) / questions + z2 / (4 * questions**2))
    # At both ends one limit equals the share, except for rounding.
    return (0.0 if right == 0 else middle - margin), (1.0 if right == questions else middle + margin)


def paired(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | int]:
    """Compare two sets of answers to the same questions.

    Returns:
        both, first, second, neither: how many questions both, only the first, only the second, or neither answered right;
        difference: the first's share of right answers minus the second's; low, high: its interval (Newcombe 1998, Statistics in
        Medicine 17:2635, method 10); p: McNemar's exact test, a sign test on the questions that only one answered right.

    Raises:
        ValueError: there is no question, or the numbers of answers differ.
    """
    for name, answers in (("first", first), ("second", second)):
        for right in items(f"paired: {name}", answers):
            flag(f"paired: {name}", right)
    if not first or len(first) != len(second):
        raise ValueError(
            f"paired: first and second must have an answer to the same questions, got {len(first)} and {len(second)}"
        )
    n = len(first)
    both = sum(x and y for x, y in zip(first, second, strict=True))
    only_first, only_second = sum(first) - both, sum(second) - both
    neither = n - both - only_first - only_second
    p1, p2 = sum(first) / n, sum(second) / n
    (low1, high1), (low2, high2) = wilson(sum(first), n), wilson(sum(second), n)
    phi = _correlation(both, only_first, only_second, neither)
    below = math.sqrt(max(0.0, (p1 - low1) ** 2 - 2 * phi * (p1 - low1) * (high2 - p2) + (high2 - p2) ** 2))
    above = math.sqrt(max(0.0, (high1 - p1) ** 2 - 2 * phi * (high1 - p1) * (p2 - low2) + (p2 - low2) ** 2))
    return {
        "both": both,
        "first": only_first,
        "second": only_second,
        "neither": neither,
        "difference": p1 - p2,
        "low": p1 - p2 - below,
        "high": p1 - p2 + above,
        "p": _sign_test(only_first, only_second),
    }


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Newcombe's phi with its continuity correction; 0 if either set of answers is all right or all wrong."""
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    if not product:
        return 0.0
    covariance: float = both * neither - first * second
    if covariance > 0:
        covariance = max(covariance - (both + first + second + neither) / 2, 0)
    return covariance / math.sqrt(product)


def _sign_test(first: int, second: int) -> float:
    n, fewer = first + second, min(first, second)
    return min(1.0, sum(math.comb(n, k) for k in range(fewer + 1)) / 2 ** (n - 1)) if n else 1.0


@cache
def student(freedom: int) -> float:
    """Within this many standard errors lie 95 % of Student's t distribution with these degrees of freedom."""
    # The density's integral by the midpoint rule, as far out as one degree of freedom needs.
    step = 13 / 2**14
    t = (torch.arange(2**14, dtype=torch.float64) + 0.5) * step
    height = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi * freedom) / 2
    inside = 2 * step * (height - (freedom + 1) / 2 * (t * t / freedom).log1p()).exp().cumsum(0)
    i = int((inside < 0.95).sum())
    return step * (i + float((0.95 - inside[i - 1]) / (inside[i] - inside[i - 1])))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the ends of its interval, by Student's t; for a single value the ends are None.

    Raises:
        ValueError: there are no values.
    """
    if not items("mean_interval: values", values):
        raise ValueError("mean_interval: there must be a value, got values=[]")
    x = torch.tensor(
        [float(value) if isinstance(value, bool) else number("mean_interval: values", value) for value in values],
        dtype=torch.float64,
    )
    mean = float(x.mean())
    if len(x) == 1:
        return mean, None, None
    margin = student(len(x) - 1) * float(x.std()) / len(x) ** 0.5
    return mean, mean - margin, mean + margin


PARTS = ("gain", "mixing", "content")
FEW = 10  # texts; with fewer, an interval stands on too little for a verdict
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
    """The mean of each of ``parts_of`` over texts, with its 95 % interval: gain, gain_low, gain_high, mixing, ...; and texts.

    Each text is compared with itself. With a single text there is no interval, and its ends are None.

    Args:
        base, mixed, another: mean losses of each text [texts], nats.
    """
    figures: dict[str, float | None] = {"texts": len(base)}
    for name, values in parts_of(base, mixed, another).items():
        figures[name], figures[f"{name}_low"], figures[f"{name}_high"] = mean_interval(values.tolist())
    return figures


def format_gain(figures: Figures, name: str = "gain", digits: int = 3) -> str:
    """One of the parts and, if there is one, its interval: +0.021 (+0.013 to +0.029)."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    mean = f"{figures[name]:+.{digits}f}"
    return mean if low is None else f"{mean} ({low:+.{digits}f} to {high:+.{digits}f})"


def smaller(figures: Figures) -> str:
    """The headline of a gain: "gain" or "content", whichever is less. Content alone can exceed what there is to gain."""
    return min("gain", "content", key=lambda name: figures[name] or 0.0)


def verdict(figures: Figures) -> str:
    """In words, what the intervals of ``mean_gains`` allow to say, and the headline.

    Own thoughts helped if they predict better than none, than another text's and, where ``figures`` has constant_low and
    constant_high, the interval of the gain over one constant thought, than that.
    """
    said = _words(figures)
    if "content" in figures:
        said += f"\nworth, the smaller of gain and content: {format_gain(figures, smaller(figures), 4)}"
    return said


def _words(figures: Figures) -> str:
    texts, gain = figures["texts"] or 0, _sign(figures, "gain")
    if texts < FEW:
        return f"too few texts to say what thinking does: {texts:.0f}, and a verdict needs {FEW}"
    if "content" not in figures:
        known = "thinking hurts" if gain < 0 else "not known whether what was thought matters"
        return f"{known}: no other text's thoughts were tried"
    content = _sign(figures, "content")
    if gain < 0:
        if content < 0:
            return "thinking hurts; another text's thoughts predict better"
        return f"thinking hurts; its own thoughts hurt {'less than' if content else 'as much as'} another text's"
    if content < 0:
        said = "what was thought hurt: another text's thoughts predict better"
    elif content == 0:
        said = "what was thought made no difference: another text's thoughts do as well"
    elif gain == 0:
        return "no gain from thinking: better than another text's thoughts, but not than none"
    elif "constant_low" in figures and _sign(figures, "constant") <= 0:
        return "no gain from what was thought: a constant one is as good"
    else:
        return "what was thought helped: better than no thoughts and than another text's"
    return said + ("\nthe gain is from mixing, whatever is thought" if gain > 0 and _sign(figures, "mixing") > 0 else "")


def _sign(figures: Figures, name: str) -> int:
    """1 or -1 where the whole interval is on that side of 0, else 0."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    return 0 if low is None or high is None else (low > 0) - (high < 0)
