"""Plots of the recipes, where matplotlib is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from quietstar.files.pictures import can_draw, legend_above, new_figure, save

Points = Sequence[tuple[float, float]]
COLORS = 10  # of matplotlib's cycle


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
    """Write a .png with these plots, up to three in a row; does nothing without matplotlib.

    A name has one colour in all of them, as far as there are colours.
    """
    if not can_draw():
        return
    rows = math.ceil(len(plots) / 3)
    columns = math.ceil(len(plots) / rows)
    width, height = (4.2, 4.0) if len(plots) > 1 else (7.5, 5.0)
    figure = new_figure(width * columns, height * rows)
    figure.suptitle(title)
    names = list(dict.fromkeys(name for panel in plots for name in (*panel.curves, *panel.bars)))
    for number, panel in enumerate(plots, 1):
        axes: Any = figure.add_subplot(rows, columns, number)
        draw(axes, panel, names if len(names) <= COLORS else [*panel.curves, *panel.bars])
        legend_above(axes, width - 0.8)
    save(figure, path)


def draw(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    color = {name: f"C{i}" for i, name in enumerate(names)}
    for place in panel.marks:
        axes.axvline(place, color="#bbbbbb", linewidth=0.6)
    for name, seeds in panel.curves.items():
        draw_curves(axes, name, seeds, color[name])
    for name, values in panel.bars.items():
        axes.barh(name, fmean(values), color=color[name], alpha=0.5)
        axes.plot(values, [name] * len(values), "o", color=color[name], markersize=3)
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


def draw_curves(axes: Any, name: str, seeds: Sequence[Points], color: str) -> None:
    """The seeds and their mean, as lines where x has one direction; else, as with speeds, lines would be a tangle of points.

    A seed that has no figure at a place has NaN there.
    """
    mean = [(fmean(x for x, _ in place), fmean(y for _, y in place if y == y)) for place in zip(*seeds, strict=True)]
    steps = [after - before for points in [mean, *seeds] for (before, _), (after, _) in zip(points, points[1:], strict=False)]
    lines = bool(steps) and (min(steps) >= 0 or max(steps) <= 0)
    if len(seeds) > 1:
        for points in seeds:
            axes.plot(*zip(*points, strict=True), "-" if lines else ".", color=color, linewidth=0.6, markersize=3, alpha=0.5)
    style = ("o-" if len(mean) < 50 else "-") if lines else "o"
    axes.plot(*zip(*mean, strict=True), style, color=color, markersize=3, label=name)
