"""The recipes' plots, where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

from quietstar.files import write_whole

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One of the plots in a picture.

    Attributes:
        across, up: what its axes show.
        curves: a line for each name, or a dot; of several seeds each is thin, and their mean thick.
        bars: a bar for each name, the mean of its values, which are dots.
        marks: places across where something changes.
        log: across in powers of 2.
        share: up is from 0 to 1.
    """

    across: str
    up: str
    curves: Mapping[str, Sequence[Points]] = field(default_factory=dict)
    bars: Mapping[str, Sequence[float]] = field(default_factory=dict)
    marks: Sequence[float] = ()
    log: bool = False
    share: bool = False


def panels(path: Path, title: str, several: Sequence[Panel]) -> None:
    """A .png with these plots, up to three in a row; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = math.ceil(len(several) / 3)
    columns = math.ceil(len(several) / rows)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows) if len(several) > 1 else (7.5, 4.6), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(several, 1):
        axes: Any = figure.add_subplot(rows, columns, number)
        for place in panel.marks:
            axes.axvline(place, color="#bbbbbb", linewidth=0.6)
        for i, (name, seeds) in enumerate(panel.curves.items()):
            for points in seeds if len(seeds) > 1 else ():
                thin = "-" if len(points) > 1 else "."
                axes.plot(*zip(*points, strict=True), thin, color=f"C{i}", linewidth=0.6, markersize=3, alpha=0.5)
            mean = [[fmean(values) for values in zip(*place, strict=True)] for place in zip(*seeds, strict=True)]
            axes.plot(*zip(*mean, strict=True), "o-" if len(mean) < 50 else "-", color=f"C{i}", markersize=3, label=name)
        for i, (name, values) in enumerate(panel.bars.items()):
            axes.barh(name, fmean(values), color=f"C{i}", alpha=0.5)
            axes.plot(values, [name] * len(values), "o", color=f"C{i}", markersize=3)
        if panel.bars:
            axes.invert_yaxis()
        if panel.log:
            axes.set_xscale("log", base=2)
        elif panel.curves and all(x == int(x) for seeds in panel.curves.values() for points in seeds for x, _ in points):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if panel.share:
            axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(panel.across)
        axes.set_ylabel(panel.up)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.curves:
            axes.legend(frameon=False, fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
