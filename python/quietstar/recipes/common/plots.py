"""Plots of the recipes, where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

from quietstar.files.writing import write_whole

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
        x_label, y_label: labels of the axes.
        curves: for each name a line per seed, or a point; with several seeds these are thin, and their mean is thick.
        bars: for each name a bar at the mean of its values, which are dots.
        marks: x positions of vertical lines.
        log: whether the x axis is in powers of 2.
        share: whether the y axis goes from 0 to 1.
    """

    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[Points]] = field(default_factory=dict)
    bars: Mapping[str, Sequence[float]] = field(default_factory=dict)
    marks: Sequence[float] = ()
    log: bool = False
    share: bool = False


def panels(path: Path, title: str, plots: Sequence[Panel]) -> None:
    """Write a .png with these plots, up to three in a row; does nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = math.ceil(len(plots) / 3)
    columns = math.ceil(len(plots) / rows)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows) if len(plots) > 1 else (7.5, 4.6), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(plots, 1):
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
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.curves:
            axes.legend(frameon=False, fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
