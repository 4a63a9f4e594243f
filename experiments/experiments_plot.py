"""The plots of docs/experiments.md."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from quietstar.files import write_whole


def lines(
    path: Path,
    x: Sequence[float],
    curves: Mapping[str, Sequence[Sequence[float]]],
    across: str,
    up: str,
    title: str,
    log: bool = False,
) -> None:
    """A .png: under each name a curve of each seed, thin, and their mean, thick; with ``log`` in powers of 2 across."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        for y in seeds:
            axes.plot(x, y, color=f"C{i}", linewidth=0.6, alpha=0.5)
        axes.plot(x, [fmean(values) for values in zip(*seeds, strict=True)], "o-", color=f"C{i}", markersize=3, label=name)
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def grid(path: Path, panels: Mapping[str, Sequence[Sequence[tuple[float, float]]]], up: str) -> None:
    """A .png with a panel under each name, and in it a line of (x, y) for each seed."""
    figure = Figure(figsize=(3 * len(panels), 3.2), layout="constrained")
    for axes, (name, seeds) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True):
        for points in seeds:
            axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=3, linewidth=0.9)
        axes.set_xlabel(name)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(up)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
